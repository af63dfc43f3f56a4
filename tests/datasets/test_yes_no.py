"""Yes/No samples: every field where it belongs, the token that says Yes for any tokenizer, histories that are cut."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert.scratch import train_tokenizer
from reclingua.datasets.prompts import YES_NO_FIELDS, YES_NO_PROMPT_FILE, PromptTemplate, read_prompts
from reclingua.datasets.rates import rate_texts, rates_before
from reclingua.datasets.ratings import liked_history, open_ratings
from reclingua.datasets.trees import HISTORY_WINDOWS, Histories, group_rows, window_starts
from reclingua.datasets.yes_no import LIKED, NO_HISTORY, YesNoCollator, YesNoDataset, format_code, yes_no_token_ids
from reclingua.utils.errors import InputError
from tests.helpers.models import make_tokenizer

SOFT = PromptTemplate('Liked {history} by {user}. New: "{title}" {item}. Answer:')


@pytest.fixture
def liked(tmp_path):
    from tests.helpers.toys import write_preferences

    write_preferences(tmp_path)
    return open_ratings(tmp_path, "liked")


def ask_about(dataset, templates, tokenizer=None, limit=10**6, **kwargs):
    titles = {int(item): about["title"] for item, about in dataset.items.items()}
    titles |= kwargs.pop("titles", {})
    tokenizer = tokenizer or make_tokenizer(False)
    return YesNoDataset(dataset.parts["test"], titles, tokenizer, templates, 4, ", ", limit, **kwargs)


def test_a_prompt_reads_as_its_template(liked):
    template = PromptTemplate('Liked {history}.\nWill "{title}" please? Answer:')
    questions = ask_about(liked, [template])
    shown = liked_history(liked.parts["test"], 4)
    for i in (0, 5, len(questions) - 1):
        history = ", ".join(f'"Thing {item}"' for item in shown[i] if item)
        text = template.prompt.format(history=history, title=f"Thing {questions.items[i]}")
        assert questions.tokenizer.decode(questions[i]["input_ids"]) == text + " "  # here a token of its own
        trunk = questions.tokenizer.decode(questions[i]["input_ids"][: questions[i]["trunk"]])
        assert trunk == text[: text.index(".\nWill")]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("soft_tokens", [1, 3])
def test_soft_tokens_stand_at_their_fields_whatever_a_title_says(liked, bos, soft_tokens):
    tokenizer = make_tokenizer(bos)
    rude = "{user} <pad> {item}</s><s> 0 {history_ids}"
    titles = {item: rude for item in range(1, 31)}
    questions = ask_about(liked, [SOFT], tokenizer, titles=titles, soft_tokens=soft_tokens)
    sample = questions[3]
    ids, soft = np.array(sample["input_ids"]), np.array(sample["soft"])
    assert soft[soft > 0].tolist() == list(range(1, 2 * soft_tokens + 1))
    before_user, before_item = (tokenizer.decode(ids[: np.argmax(soft == first)]) for first in (1, soft_tokens + 1))
    assert before_user.endswith(" by ") and before_item.endswith('" ')
    assert tokenizer.decode(ids[soft == 0]).endswith('" . Answer: ')
    specials = set(ids[soft == 0].tolist()) & set(tokenizer.all_special_ids)
    assert specials == ({tokenizer.bos_token_id} if bos else set())
    assert (ids == tokenizer.bos_token_id).sum() == bos


def test_a_history_as_soft_tokens(liked):
    questions = ask_about(liked, [PromptTemplate("{history}, as vectors {history_ids}. {user} and {title} {item}: ")])
    sample = questions[0]
    there = np.flatnonzero(sample["liked"][0])
    vectors = [number - 1 - LIKED for number in sample["soft"] if number > LIKED]
    assert vectors == there.tolist() and len(there) > 1


def test_lengths_are_those_of_the_samples(liked):
    templates = [template for template in read_prompts(YES_NO_PROMPT_FILE, YES_NO_FIELDS)["soft"]]
    questions = ask_about(liked, templates, draw=True, seed=3)
    written = []
    for epoch in range(6):
        questions.set_epoch(epoch)
        written.append([len(questions[i]["input_ids"]) for i in range(len(questions))])
        assert questions.lengths().tolist() == written[-1]
    assert written[0] != written[1]
    assert (questions.lengths(longest=True) >= np.max(written, 0)).all()
    assert (questions.lengths(longest=True) == np.max(written, 0)).mean() > 0.5


def test_a_long_prompt_loses_its_oldest_titles_and_no_more(liked):
    template = PromptTemplate('Liked {history}. New: "{title}". Answer:')
    whole = ask_about(liked, [template])
    longest = int(whole.lengths().max())
    cut = ask_about(liked, [template], limit=longest - 1)
    assert cut.lengths().max() < longest and whole.num_truncated == 0 and 0 < cut.num_truncated < len(cut)
    i = int(np.argmax(whole.lengths()))
    text, before = (q.tokenizer.decode(q[i]["input_ids"]) for q in (cut, whole))
    oldest = f'"Thing {whole.histories.shown(i, whole.starts[i])[0]}", '
    assert before == text.replace("Liked ", "Liked " + oldest)
    with pytest.raises(InputError, match="without any history, the model reads 5"):
        ask_about(liked, [template], limit=5)


def test_cold_rows_are_asked_by_words_alone(liked):
    cold = PromptTemplate('Only "{title}" after {history}. Answer:')
    questions = ask_about(liked, [SOFT], cold_template=cold)
    kinds = {
        (bool(questions.is_cold[i]), bool(questions[i]["with_ids"]), any(questions[i]["soft"])) for i in range(240)
    }
    assert kinds == {(False, True, True), (True, False, False)}


def test_codes_as_text(liked):
    bits = torch.tensor([int(bit) for bit in "10101100000100001111111000000011"], dtype=torch.bool)
    assert format_code(bits, "bits") == "10101100000100001111111000000011"
    assert format_code(bits, "ip") == "172.16.254.3"
    codes = ({i: f"1{i}" for i in range(99)}, {i: f"0{i}" for i in range(99)})
    questions = ask_about(liked, [SOFT], codes=codes)
    text = questions.tokenizer.decode(questions[0]["input_ids"])
    assert f"by 1{questions.users[0]}." in text and text.endswith(f'" 0{questions.items[0]}. Answer: ')
    assert not any(questions[0]["soft"])


def test_a_batch_is_padded_on_the_right(liked):
    questions = ask_about(liked, [SOFT], read_length=6)
    samples = [questions[i] for i in (0, 7, 100)]
    batch = YesNoCollator(questions.tokenizer)(samples)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"] and batch["last"][row] == length - 1
    assert batch["histories"].shape == (3, 6) and batch["liked"].shape == (3, 4)


# ---- Trees ----


def test_window_starts():
    lengths = np.arange(40)
    assert window_starts(lengths, 10, "sliding").tolist() == [0] * 10 + list(range(30))
    assert window_starts(lengths, 10, "anchored").tolist() == [0] * 20 + [10] * 10 + [20] * 10


@pytest.mark.parametrize("history_window", HISTORY_WINDOWS)
@pytest.mark.parametrize("codes", [False, True])
def test_a_row_of_a_tree_has_the_tokens_of_its_prompt(liked, history_window, codes):
    """Trunk up to where it sees and its branch, at the places of the prompt, whatever the length of the history."""
    texts = ({i: f"1{i}" for i in range(99)}, {i: f"0{i}" for i in range(99)}) if codes else None
    for template in (SOFT, PromptTemplate('For {user}, {item}: liked {history}, asked about "{title}". Answer:')):
        settings = {"soft_tokens": 2, "codes": texts, "history_window": history_window}
        alone = ask_about(liked, [template], **settings)
        many = ask_about(liked, [template], rows_per_tree=5, **settings)
        assert sorted(np.concatenate(many.trees)) == list(range(len(alone))) and len(many) < len(alone)
        batch = YesNoCollator(many.tokenizer)([many[tree] for tree in range(len(many))])
        for number, row in enumerate(np.concatenate(many.trees).tolist()):
            tree = batch["tree"][number]
            is_branch = (batch["row"][tree] == number) & (batch["branch"][tree] > 0)
            end = int(batch["visible"][tree][is_branch][0])
            places = torch.cat([torch.arange(end), is_branch.nonzero()[:, 0]])
            assert batch["input_ids"][tree, places].tolist() == alone[row]["input_ids"]
            assert batch["position_ids"][tree, places].tolist() == list(range(len(places)))
            assert batch["soft"][tree, places].tolist() == alone[row]["soft"]
            assert batch["last"][number] == places[-1] and batch["labels"][number] == alone.labels[row]


@pytest.mark.parametrize("rows_per_tree", [1, 5])
def test_an_empty_history_is_told_once(liked, rows_per_tree):
    part = liked.parts["test"].take(3).map(lambda row, i: row | {"his": row["his"][:i]}, with_indices=True)
    titles = {int(item): about["title"] for item, about in liked.items.items()}
    settings = {"history_window": "anchored", "rows_per_tree": rows_per_tree}
    template = PromptTemplate('Liked {history}. New: "{title}". Answer:')
    questions = YesNoDataset(part, titles, make_tokenizer(False), [template], 4, ", ", 10**6, **settings)
    text = questions.tokenizer.decode(questions[0]["input_ids"])  # row 0 has no history
    assert text.count(NO_HISTORY) == 1


def test_histories_that_are_no_prefixes_make_trees_of_their_own():
    items, offsets = np.array([1, 2, 1, 2, 3, 1, 9, 5]), np.array([0, 2, 5, 7, 7, 8])
    users, kinds = np.array([1, 1, 1, 1, 2]), np.zeros(5, int)
    trees, num_breaks = group_rows(users, kinds, Histories(items, offsets), np.zeros(5, int), 16)
    assert [tree.tolist() for tree in trees] == [[3, 0], [1], [2], [4]] or num_breaks
    for tree in trees:
        shown = [Histories(items, offsets).shown(row, 0).tolist() for row in tree]
        assert all(after[: len(before)] == before for before, after in zip(shown, shown[1:], strict=False))
    assert num_breaks >= 1 and sorted(np.concatenate(trees)) == [0, 1, 2, 3, 4]


# ---- Like-rates as text ----


def test_rates_count_what_was_rated_before(liked):
    """Against a slow count; neither the row itself nor anything at its time or later is in it."""
    train = liked.parts["train"].select(range(300))
    frame = train.to_pandas()
    for column in ("iid", "uid"):
        likes, ratings = rates_before(train, train, column)
        for row in range(0, 300, 7):
            earlier = frame[(frame[column] == frame[column][row]) & (frame["timestamp"] < frame["timestamp"][row])]
            assert (likes[row], ratings[row]) == (earlier["label"].sum(), len(earlier))
        flipped = frame.assign(label=1 - frame["label"])  # of all rows: no row's own rate is the same for both labels
        other, _ = rates_before(Dataset.from_pandas(flipped), train, column)
        assert (likes + other == ratings).all()
    likes, ratings = rates_before(liked.parts["train"], liked.parts["test"], "iid")
    counts = liked.parts["train"].to_pandas().groupby("iid")["label"].agg(["sum", "count"])
    for row, item in enumerate(liked.parts["test"]["iid"][:50]):
        assert (likes[row], ratings[row]) == (tuple(counts.loc[item]) if item in counts.index else (0, 0))


def test_rates_stand_in_the_prompt(liked):
    texts = rate_texts(liked.parts["train"], liked.parts["test"], {"item_rate", "user_rate", "title"})
    template = PromptTemplate('Liked {history}. "{title}" by {item_rate}, user {user_rate}: ')
    questions = ask_about(liked, [template], row_texts=texts)
    text = questions.tokenizer.decode(questions[5]["input_ids"])
    assert text.endswith(f"by {texts['item_rate'][5]}, user {texts['user_rate'][5]}: ")
    assert texts.keys() == {"item_rate", "user_rate"}
    train = liked.parts["train"].to_pandas()
    item = train["label"][train["iid"] == liked.parts["test"]["iid"][5]]
    rate = (item.sum() + 5 * train["label"].mean()) / (len(item) + 5)
    assert texts["item_rate"][5] == f"{100 * rate:.0f}%"
    prompts = read_prompts(YES_NO_PROMPT_FILE.with_name("yes_no_rates.yaml"), YES_NO_FIELDS)
    assert all({"item_rate", "user_rate"} < template.fields for task in prompts.values() for template in task)


# ---- Which token says Yes ----


def words_tokenizer(words, metaspace=False):
    """Whole words, or, with metaspace, words with their space as a token of its own."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("▁", "isolated")])
        if metaspace
        else pre_tokenizers.Whitespace()
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def test_the_answer_of_whole_words():
    tokenizer = words_tokenizer(["<unk>", "</s>", "Answer", ":", "Yes", "No"])
    assert yes_no_token_ids(tokenizer, "Answer:") == ([2, 3], (4, 5))


def test_a_space_that_is_a_token_belongs_to_the_prompt():
    tokenizer = words_tokenizer(["<unk>", "</s>", "▁", "Answer:", "Yes", "No"], metaspace=True)
    ids, answer = yes_no_token_ids(tokenizer, "Answer:")
    assert (ids, answer) == ([2, 3, 2], (4, 5))


@pytest.mark.parametrize("ending", ["Answer:", "Answer: ", "Answer:\n", "Reply with Yes or No"])
def test_the_answer_of_a_byte_level_tokenizer_is_what_follows(ending):
    tokenizer = make_tokenizer(True)
    ids, answer = yes_no_token_ids(tokenizer, ending)
    for word, token in zip(("Yes", "No"), answer, strict=True):
        gap = "" if ending[-1].isspace() else " "
        whole = tokenizer(ending + gap + word, add_special_tokens=False).input_ids
        assert whole[: len(ids) + 1] == [*ids, token]
    assert answer.yes != answer.no


@pytest.mark.parametrize("words", [["Yes"], [], ["No"]])
def test_a_tokenizer_that_cannot_tell_is_refused(words):
    tokenizer = words_tokenizer(["<unk>", "</s>", "Answer", ":", *words])
    with pytest.raises(InputError, match="start with the same token"):
        yes_no_token_ids(tokenizer, "Answer:")


def test_yes_and_no_that_begin_with_the_same_token_are_refused():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "Z": 1, "Y": 2, "e": 3, "s": 4, "N": 5, "o": 6}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="Z")]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>", pad_token="<unk>")
    with pytest.raises(InputError, match="start with the same token"):
        yes_no_token_ids(wrapped, "es")


def test_prompts_must_lead_to_one_answer(liked):
    tokenizer = train_tokenizer([" Yes No Yes No"] * 50, vocab_size=320, max_length=512)
    spaced, broken = PromptTemplate('{history} "{title}". Answer:'), PromptTemplate('{history} "{title}". Answer:\n')
    assert tokenizer.convert_ids_to_tokens(ask_about(liked, [spaced], tokenizer).answer) == ["ĠYes", "ĠNo"]
    assert tokenizer.convert_ids_to_tokens(ask_about(liked, [broken], tokenizer).answer) == ["Ye", "No"]
    with pytest.raises(InputError, match="after prompt template 1 Yes"):
        ask_about(liked, [broken, spaced], tokenizer)


def test_every_shipped_prompt_has_its_fields_and_ends_alike(liked):
    prompts = read_prompts(YES_NO_PROMPT_FILE, YES_NO_FIELDS)
    for task, templates in prompts.items():
        assert len(templates) >= 4 and len({p.prompt for p in templates}) == len(templates), task
    ask_about(liked, [template for templates in (prompts["text"], prompts["soft"]) for template in templates])


@pytest.mark.parametrize(
    "text, message",
    [
        ("soft: [{prompt: '{history} {title} {user}'}]", "lacks the field {item}"),
        ("soft: [{prompt: '{history} {title} {user} {item} {cost}'}]", "unknown field {cost}"),
        ("text: [{prompt: 'x'}]", "task 'soft' has no prompt template"),
    ],
)
def test_bad_question_files(tmp_path, text, message):
    (tmp_path / "q.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "q.yaml", {"soft": YES_NO_FIELDS["soft"]})
