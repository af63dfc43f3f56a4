"""Instruction samples: what is asked, what is learned, which prompt is drawn."""

import json
import shutil
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reclingua.datasets.collators import IGNORE, CausalLMCollator, encode_prompt, prompt_batch
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import LCREC_PROMPT_FILE, check_prompts, read_prompts
from reclingua.datasets.tasks import held_out_samples, history_segment, seqrec_task, train_samples
from reclingua.models.vocabulary import code_tokens, index_token_ids
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.models import make_tokenizer


def build(toy, targets, bos=False, part="train", his_sep=", ", **kwargs):
    dataset = open_interactions(toy, "toy", ["index"])
    tokenizer = make_tokenizer(bos)
    tokenizer.add_tokens(code_tokens(dataset.index))
    task = seqrec_task(targets)
    if part == "train":
        samples = train_samples(dataset, task, max_his_len=3)
    else:
        samples = held_out_samples(dataset, part, task, max_his_len=3)
    token_ids = index_token_ids(tokenizer, dataset.index)
    return dataset, InstructionDataset(samples, dataset, tokenizer, read_prompts(), token_ids, 3, his_sep, **kwargs)


def learned(sample):
    return [label for label in sample["labels"] if label != IGNORE]


def test_next_gives_a_sample_for_each_prefix(toy):
    dataset, instructions = build(toy, "last")
    assert len(instructions) == sum(len(dataset.train_history(user)) - 1 for user in dataset.histories)
    last = [row for row in instructions.samples if row["user"] == "1"][-1]  # trains on 1 2 3 4 5
    assert last["history"] == ["2", "3", "4"] and last["item"] == "5"


@pytest.mark.parametrize("bos", [True, False])
def test_next_learns_the_response_and_its_end(toy, bos):
    dataset, instructions = build(toy, "last", bos)
    sample, row = instructions[0], instructions.samples[0]
    tokenizer = instructions.tokenizer
    assert tokenizer.decode(learned(sample)).replace(" ", "") == "".join(dataset.index[row["item"]]) + "</s>"
    assert (sample["input_ids"][0] == tokenizer.bos_token_id) == bos
    assert sample["input_ids"].count(tokenizer.bos_token_id) == bos
    assert len(sample["input_ids"]) == len(sample["labels"])


def test_whole_samples_learn_everything_if_asked(toy):
    for targets in ("last", "all"):
        _, instructions = build(toy, targets, only_response=False)
        assert instructions[0]["labels"] == instructions[0]["input_ids"]


@given(st.integers(2, 60), st.integers(1, 20), st.floats(0, 1, exclude_max=True))
def test_stretches_make_each_item_a_target_once(length, size, shift):
    items = list(range(length))
    parts = -(-(length - 1) // size)
    stretches = [history_segment(items, part, parts, size, shift) for part in range(parts)]
    assert Counter(item for one in stretches for item in one[1:]) == Counter(items[1:])
    assert all(2 <= len(one) <= size + 1 for one in stretches)


@pytest.mark.parametrize("his_sep", ["", ", ", " -> "])
@pytest.mark.parametrize("bos", [True, False])
def test_history_learns_every_item_after_the_first(toy, bos, his_sep):
    dataset, instructions = build(toy, "all", bos, his_sep=his_sep)
    for epoch in range(3):
        instructions.set_epoch(epoch)
        targets = Counter()
        for i in range(len(instructions)):
            row = instructions.samples[i]
            text = instructions.tokenizer.decode(learned(instructions[i])).replace(" ", "")
            codes = text.replace("><", "> <").split()
            targets.update((row["user"], a + b) for a, b in zip(codes[::2], codes[1::2], strict=True))
        want = Counter(
            (user, "".join(dataset.index[item]))
            for user in dataset.histories
            for item in dataset.train_history(user)[1:]
        )
        assert targets == want


@pytest.mark.parametrize("his_sep", ["", ", "])
@pytest.mark.parametrize("add_prefix", [True, False])
def test_a_history_is_asked_as_it_was_learned(toy, his_sep, add_prefix):
    """The prompt of a test is a beginning of a training text, token by token, up to where the item goes."""
    _, instructions = build(toy, "all", his_sep=his_sep, add_prefix=add_prefix)
    template = instructions.prompts["seqrec_history"][0]
    items = ["0", "4", "8"]
    row = instructions.samples[0] | {"history": ["0", "4"], "item": "8"}
    prompt = instructions.tokenizer(instructions.render_prompt(row, template)).input_ids
    whole = instructions._encode_history(items, template)
    assert whole["input_ids"][: len(prompt)] == prompt
    assert instructions.encode(row, template)["input_ids"] == whole["input_ids"]
    assert instructions.encode(row, template)["labels"][-2:] == whole["labels"][-2:] == whole["input_ids"][-2:]


def test_prompts_depend_on_seed_and_epoch_alone(toy):
    _, one = build(toy, "last", seed=1)
    _, same = build(toy, "last", seed=1)
    _, other = build(toy, "last", seed=2)
    drawn = [one[i] for i in range(len(one))]
    assert drawn == [same[i] for i in reversed(range(len(same)))][::-1]
    assert drawn != [other[i] for i in range(len(other))]
    one.set_epoch(1)
    assert drawn != [one[i] for i in range(len(one))]
    one.set_epoch(0)
    assert drawn == [one[i] for i in range(len(one))]


def test_each_sample_can_have_several_prompts(toy):
    _, instructions = build(toy, "last", templates_per_sample={"seqrec": 3})
    assert len(instructions) == 3 * len(instructions.samples)


def test_held_out_items_never_train(toy):
    for targets in ("last", "all"):
        dataset, instructions = build(toy, targets)
        for row in instructions.samples:
            told = [*row["history"], row["item"]] if row["item"] else row["history"]
            history = dataset.histories[row["user"]]
            assert len(told) <= len(history) - 2 and set(told) <= set(history[:-2])


def test_batches_are_padded(toy):
    _, instructions = build(toy, "last")
    rows = [instructions[0], instructions[2]]
    batch = CausalLMCollator(instructions.tokenizer)(rows)
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][at, :length].tolist() == row["input_ids"]
        assert (batch["labels"][at, length:] == IGNORE).all()
    left = prompt_batch(instructions.tokenizer, [encode_prompt(instructions.tokenizer, t) for t in ("a user", "a")])
    assert left["attention_mask"][1, 0] == 0 and left["attention_mask"][:, -1].all()


def test_sample_num_draws_that_many(toy):
    dataset = open_interactions(toy, "toy", ["index"])
    few = train_samples(dataset, "seqrec", 3, count=5, seed=1)
    assert len(few) == 5 and few["user"] == train_samples(dataset, "seqrec", 3, count=5, seed=1)["user"]


def test_nothing_to_train_on(toy, edit):
    edit("inter", lambda inter: {"0": [1, 2, 3]})
    with pytest.raises(InputError, match="nothing to train seqrec on"):
        train_samples(open_interactions(toy, "toy", ["index"]), "seqrec", 3)


# ---- prompt files ----


def test_shipped_prompts():
    prompts = read_prompts()
    assert len(prompts["seqrec"]) >= 10 and len(set(prompts["seqrec"])) == len(prompts["seqrec"])


BAD_PROMPTS = {
    "no such prompt file": None,
    "not a readable YAML": "seqrec: [",
    "should map each task": "- a",
    "has no prompt template": "seqrec: []",
    "prompt template 0 should have just prompt and response": "seqrec: [{prompt: 'x {history}'}]",
    "prompt has the unknown field {histry}": "seqrec: [{prompt: '{histry}', response: '{target}'}]",
    "prompt lacks the field {history}": "seqrec: [{prompt: 'x', response: '{target}'}]",
    "response lacks the field {target}": "seqrec: [{prompt: '{history}', response: 'x'}]",
    "{history} should stand alone": "seqrec: [{prompt: '{history!r}', response: '{target}'}]",
    "has a stray brace or a format": "seqrec: [{prompt: '{history:d}', response: '{target}'}]",
    "the response must be {target} and nothing else": "seqrec: [{prompt: '{history}', response: 'It is {target}'}]",
    "stray brace": "seqrec: [{prompt: '{history', response: '{target}'}]",
    "must end with": "seqrec: [{prompt: '{history}', response: '{target}'}]\n"
    "seqrec_history: [{prompt: '{history} x'}]",
}


@pytest.mark.parametrize("message", BAD_PROMPTS)
def test_bad_prompt_files(tmp_path, message):
    path = tmp_path / "prompts.yaml"
    if BAD_PROMPTS[message] is not None:
        path.write_text(BAD_PROMPTS[message])
    with pytest.raises(InputError) as raised:
        read_prompts(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("message", [message for message, text in BAD_PROMPTS.items() if "seqrec: [{" in (text or "")])
def test_prompts_of_a_checkpoint_are_checked_as_those_of_a_file(message):
    templates = yaml.safe_load(BAD_PROMPTS[message])
    with pytest.raises(InputError) as raised:
        check_prompts("ckpt/reclingua.json", templates)
    assert message in str(raised.value) and "ckpt/reclingua.json" in str(raised.value)


def test_prompts_of_a_checkpoint_that_would_fill_the_memory(tuned, tmp_path, refused):
    import test as test_script

    shutil.copytree(tuned, tmp_path / "tuned", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "tuned" / METADATA_FILE
    content = json.loads(file.read_text())
    check_prompts(file, content["prompts"])
    task = next(iter(content["prompts"]))
    for templates in ([{"prompt": "{history:>9999999999}", "response": ""}], ["{history}"], 3, {"a": 1}):
        file.write_text(json.dumps(content | {"prompts": {task: templates}}))
        assert str(file) in refused(test_script.main, "--ckpt_path", tmp_path / "tuned")
    long = [{"prompt": "x" * 10**7 + "{history}", "response": "{target}"}]
    for change in ({"prompts": {"seqrec": long}}, {"his_sep": "x" * 10**7}, {"base_dtype": "exec"}):
        file.write_text(json.dumps(content | change))
        assert str(file) in refused(test_script.main, "--ckpt_path", tmp_path / "tuned")
    with pytest.raises(InputError, match="unknown task 'cooking'"):
        check_prompts(file, {"cooking": []})


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(LCREC_PROMPT_FILE.read_text().replace("Items of one user", "Eines Nutzers Dinge"))
    assert read_prompts(path)["seqrec_history"][0].prompt.startswith("Eines")
