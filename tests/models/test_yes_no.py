"""Models that answer Yes or No: what is trained and what is not, what a batch may not change, what is saved."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.ratings import open_ratings
from reclingua.inference.scorer import tree_batches
from reclingua.models.collm import CoLLM
from reclingua.models.cora import CoRA
from reclingua.models.lora import linear_layers
from reclingua.models.yes_no import YesNoConfig, YesNoModel
from reclingua.utils.errors import InputError
from tests.helpers.models import OTHERS, make_model
from tests.helpers.toys import write_preferences
from tests.helpers.yes_no_models import batch_of, logits_of, make_cf_model, make_yes_no_model, questions_for, scorer_of


@pytest.fixture(scope="module")
def liked(tmp_path_factory):
    root = tmp_path_factory.mktemp("liked")
    write_preferences(root)
    return open_ratings(root, "liked")


KINDS = [(YesNoModel, "mf"), (CoLLM, "mf"), (CoLLM, "sasrec"), (CoLLM, "din"), (CoRA, "mf"), (CoRA, "lightgcn"),
         (CoRA, "sasrec"), (CoRA, "din"), (CoLLM, "hash")]  # fmt: skip


@pytest.mark.parametrize("kind, cf_model", KINDS)
def test_neither_padding_nor_neighbours_change_a_logit(liked, kind, cf_model):
    model, tokenizer = make_yes_no_model(kind, cf_model=cf_model)
    questions = questions_for(model, tokenizer, liked, num_rows=40)
    rows = [0, 1, 2, 20, 21, 30, 39]
    alone = torch.cat([logits_of(model, questions, [i]) for i in rows])
    assert alone.std() > 3e-3
    for order in (rows, rows[::-1]):
        expected = alone if order is rows else alone.flip(0)
        torch.testing.assert_close(logits_of(model, questions, order), expected, rtol=0, atol=1e-4)
    for size in (1, 3, 64):
        found = scorer_of(model, tokenizer, liked).score_samples(questions, size)
        torch.testing.assert_close(torch.from_numpy(found)[rows], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*OTHERS, "llama", "llama-tied", "qwen2", "qwen3", "mistral", "gpt2", "gemma"])
def test_the_logit_is_the_language_models_own(liked, name):
    model, tokenizer = make_yes_no_model(YesNoModel, name, lora=name != "gpt-neo")
    questions = questions_for(model, tokenizer, liked)
    rows = [0, 1, 2, 50, 120]
    for i, found in zip(rows, logits_of(model, questions, rows), strict=True):
        with torch.no_grad():
            full = model.language(input_ids=torch.tensor([questions[i]["input_ids"]])).logits[0, -1, 37]
        assert abs(found - full) < 1e-4


# ---- Trees ----


def without_dropout(model):
    """Trees share the noise of their trunk, so equality of gradients needs none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model.cf_model is not None:
        model.cf_model.config.dropout = 0.0
    return model.train()


@pytest.mark.parametrize("name, history_window", [
    ("llama", "sliding"), ("llama", "anchored"),
    *(pytest.param(name, "anchored", marks=pytest.mark.slow) for name in ("qwen3", "mistral", "gpt2", "gemma")),
])  # fmt: skip
@pytest.mark.parametrize(
    "kind, cf_model, trained",
    [
        (YesNoModel, "mf", ["lora"]),
        (CoLLM, "mf", ["projector", "lora"]),
        (CoLLM, "mf", ["projector"]),  # its trunks are computed without gradients
        (CoLLM, "sasrec", ["projector", "cf_model"]),
        (CoLLM, "din", ["projector"]),
    ],
)
def test_trees_have_the_logits_and_gradients_of_single_rows(liked, history_window, name, kind, cf_model, trained):
    model, tokenizer = make_yes_no_model(kind, name, cf_model, trained, offset=1.0)
    without_dropout(model)
    logits, gradients, sizes = [], [], []
    for rows_per_tree in (16, 1):
        questions = questions_for(model, tokenizer, liked, history_window=history_window, rows_per_tree=rows_per_tree)
        model.zero_grad()
        output = model(**batch_of(questions, range(len(questions))))
        output.loss.backward()
        order = np.argsort(np.concatenate(questions.trees))
        logits.append(output.logits.detach()[order])
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        sizes.append(questions.lengths().sum())
    assert sizes[0] < sizes[1] * {"anchored": 0.5, "sliding": 0.75}[history_window]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=float(1e-5 * largest))


def test_a_row_sees_nothing_later_than_itself(liked):
    """Other titles, items and users of later rows of its tree change no logit."""
    model, tokenizer = make_yes_no_model(CoLLM)
    questions = questions_for(model, tokenizer, liked, history_window="anchored", rows_per_tree=16)
    tree = int(np.argmax([len(set(np.diff(questions.histories.offsets)[rows])) for rows in questions.trees]))
    rows, before = questions.trees[tree], logits_of(model, questions, [tree])
    lengths = np.diff(questions.histories.offsets)[rows]
    middle = lengths[len(rows) // 2]
    later = lengths > middle
    assert 1 < later.sum() < len(rows) - 1
    last = rows[-1]
    start = questions.histories.offsets[last]
    questions.histories.items[start + middle : start + lengths[-1]] = 7
    questions.items[rows[later]], questions.users[rows[later]] = 9, 11
    after = logits_of(model, questions, [tree])
    torch.testing.assert_close(after[~later], before[~later], rtol=0, atol=1e-6)
    assert (after[later] - before[later]).abs().min() > 1e-5


def test_trees_are_for_models_that_honour_their_mask():
    supported = {
        name: make_yes_no_model(YesNoModel, name, lora=name != "gpt-neo")[0].supports_trees for name in OTHERS
    }
    assert supported == dict.fromkeys(OTHERS, False)
    assert not make_yes_no_model(CoRA)[0].supports_trees


def test_batches_of_trees_have_as_many_rows_as_allowed(liked):
    model, tokenizer = make_yes_no_model(YesNoModel)
    questions = questions_for(model, tokenizer, liked, history_window="anchored", rows_per_tree=8)
    batches = tree_batches(questions, 10)
    assert sorted(tree for batch in batches for tree in batch) == list(range(len(questions)))
    rows = [sum(len(questions.trees[tree]) for tree in batch) for batch in batches]
    assert max(rows) <= 10 and len(batches) < len(questions)
    with pytest.raises(InputError, match="batch_size 0: should be 1 at least"):
        tree_batches(questions, 0)


# ---- What is trained ----

TRAINED = [
    (YesNoModel, ["lora"]),
    (YesNoModel, ["language"]),
    (CoLLM, ["projector"]),
    (CoLLM, ["projector", "cf_model"]),
    (CoLLM, ["projector", "lora"]),
    (CoRA, ["projector"]),
    (CoRA, ["projector", "cf_model", "lora"]),
]


@pytest.mark.parametrize("kind, trained", TRAINED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_stays_bit_for_bit(liked, kind, trained, checkpointing):
    model, tokenizer = make_yes_no_model(kind, cf_model="sasrec", trained=trained)
    if checkpointing:
        model.gradient_checkpointing_enable()
    questions = questions_for(model, tokenizer, liked)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    model.train()
    assert model.cf_model is None or model.cf_model.training == ("cf_model" in trained)
    for step in range(2):
        loss = model(**batch_of(questions, range(step, 40 + step))).loss
        loss.backward()
        with_gradient = {
            model.component_of(name) for name, weight in model.named_parameters() if weight.grad is not None
        }
        assert with_gradient == set(trained)
        optimizer.step()
        optimizer.zero_grad()
    changed = {model.component_of(name) for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == set(trained)
    if not checkpointing and kind is not YesNoModel:
        assert not model.language.training or "lora" in trained


def test_loss_is_binary_cross_entropy_on_that_logit(liked):
    model, tokenizer = make_yes_no_model(YesNoModel, offset=2.0)
    questions = questions_for(model, tokenizer, liked)
    batch = batch_of(questions, range(9))
    output = model(**batch)
    expected = nn.functional.binary_cross_entropy_with_logits(output.logits - 2, batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**batch, num_items_in_batch=18).loss, expected / 2)


@pytest.mark.parametrize("kind", [YesNoModel, CoLLM, CoRA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_parts_are_float32_under_half_precision(liked, kind, dtype):
    model, tokenizer = make_yes_no_model(kind)
    model.language.to(dtype)
    model.freeze_parameters()
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    frozen = {w.dtype for name, w in model.named_parameters() if model.component_of(name) == "language"}
    assert trained == {torch.float32} and frozen == {dtype}
    questions = questions_for(model, tokenizer, liked)
    output = model.train()(**batch_of(questions, range(6)))
    output.loss.backward()
    assert output.logits.dtype == torch.float32 and output.loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.requires_grad)


# ---- CoRA ----


def test_cora_begins_as_the_base_model(liked):
    model, tokenizer = make_yes_no_model(CoRA)
    for b in model.b.values():  # which `make_yes_no_model` has filled
        nn.init.zeros_(b.weight)
    questions = questions_for(model, tokenizer, liked)
    rows = range(8)
    text = YesNoModel(YesNoConfig(answer=37, trained=[], saved=[]), copy.deepcopy(model.language)).eval()
    for layer in linear_layers(text.language, model.config.targets).values():
        layer._forward_hooks.clear()
    torch.testing.assert_close(logits_of(model, questions, rows), logits_of(text, questions, rows), rtol=0, atol=0)


@pytest.mark.parametrize("architecture, targets", [
    ("llama", ["q_proj", "v_proj"]), ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ("llama", ["down_proj", "up_proj"]), ("qwen3", ["o_proj", "q_proj"]), ("gpt2", ["c_attn", "c_proj"]),
])  # fmt: skip
def test_cora_merged_for_one_pair_is_the_hooked_model(liked, architecture, targets):
    model, tokenizer = make_yes_no_model(CoRA, architecture, targets=targets, lora=architecture != "gpt2")
    questions = questions_for(model, tokenizer, liked)
    hooked = logits_of(model, questions, [0, 120])
    for row, i in enumerate((0, 120)):
        batch = batch_of(questions, [i])
        merged = model.merge(batch["users"], batch["items"])
        with torch.no_grad():
            logit = merged(input_ids=batch["input_ids"]).logits[0, -1, 37]
            base = model.language(input_ids=batch["input_ids"]).logits[0, -1, 37]
        assert abs(logit - hooked[row]) < 1e-5 * max(1, abs(logit)) and abs(base - logit) > 1e-2


def test_cora_gives_each_row_its_own_weights(liked):
    model, tokenizer = make_yes_no_model(CoRA)
    questions = questions_for(model, tokenizer, liked)
    batch = batch_of(questions, [0, 0])
    with torch.no_grad():
        one = model(**batch).logits
        batch["users"], batch["items"] = torch.tensor([3, 20]), torch.tensor([4, 9])
        two = model(**batch).logits
        batch["users"], batch["items"] = batch["users"].flip(0), batch["items"].flip(0)
        swapped = model(**batch).logits
        off = model(**(batch | {"with_ids": torch.tensor([False, False])})).logits
        plain = model.language(input_ids=batch["input_ids"]).logits[:, -1, 37]
    assert one[0] == one[1] and abs(two[0] - two[1]) > 1e-3
    torch.testing.assert_close(swapped, two.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-5)


def test_cora_refuses_layers_that_are_not_there_and_odd_widths():
    with pytest.raises(InputError, match="no layer 'w_proj'; it has .*q_proj"):
        make_yes_no_model(CoRA, targets=["w_proj"])
    with pytest.raises(InputError, match="16 wide together"):
        make_yes_no_model(CoRA, num_heads=3)


# ---- CoLLM ----


def test_soft_tokens_are_what_the_map_makes_of_the_embeddings(liked):
    model, tokenizer = make_yes_no_model(CoLLM, soft_tokens=2)
    template = [PromptTemplate('{history} {history_ids} {user} "{title}" {item}:')]
    questions = questions_for(model, tokenizer, liked, template)
    model.fit_normalization(torch.arange(1, 41), torch.arange(1, 31))
    batch = batch_of(questions, [0, 100])
    with torch.no_grad():
        words = model.embed_inputs(**batch)
        plain = model.get_input_embeddings()(batch["input_ids"])
        for row in range(2):
            soft = batch["soft"][row]
            assert torch.equal(words[row, soft == 0], plain[row, soft == 0])
            whose = {1: ("user", batch["users"]), 3: ("item", batch["items"])}
            whose |= {5 + 2 * place: ("item", batch["liked"][:, place]) for place in range(4)}
            for first, (name, ids) in whose.items():
                if first not in soft:
                    continue
                vector = getattr(model.cf_model, f"{name}_embedding")(ids[row])
                tokens = model.maps["8"](model.normalize(name, vector)).view(2, -1)
                place = int((soft == first).nonzero())
                torch.testing.assert_close(words[row, place : place + 2], tokens)
        assert (batch["soft"][0] > 4).sum() >= 2


def test_vectors_are_brought_to_one_scale():
    model, _ = make_yes_no_model(CoLLM, cf_model="din")
    users, items = torch.randint(1, 41, (500,)), torch.randint(1, 31, (500,))
    histories = torch.randint(0, 31, (500, 10))
    model.fit_normalization(users, items, histories)
    with torch.no_grad():
        scaled = model.normalize("user", model.cf_model.user_vectors(users, histories, items))
    torch.testing.assert_close(scaled.mean(0), torch.zeros(24), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std(0), torch.ones(24), rtol=0, atol=1e-4)


def test_one_prompt_for_all_knows_nobody(liked):
    model, tokenizer = make_yes_no_model(CoLLM, one_for_all=True)
    questions = questions_for(model, tokenizer, liked)
    batch = batch_of(questions, [0])
    with torch.no_grad():
        first = model(**batch).logits
        second = model(**(batch | {"users": torch.tensor([9]), "items": torch.tensor([9])})).logits
    assert first == second


# ---- What is saved ----


@pytest.mark.parametrize("kind, trained", TRAINED)
@pytest.mark.parametrize("full", [False, True])
def test_a_reloaded_model_gives_the_same_logits(liked, tmp_path, kind, trained, full):
    model, tokenizer = make_yes_no_model(kind, "llama-tied", cf_model="lightgcn", trained=trained)
    base = make_model("llama-tied", len(tokenizer) + 8, spread=3)
    base.save_pretrained(tmp_path / "base")
    make_cf_model("lightgcn").save_pretrained(tmp_path / "cf_model")
    model.config.base_model, model.config.cf_model = str(tmp_path / "base"), str(tmp_path / "cf_model")
    model.config.saved = sorted({*model.config.saved, *trained})
    model.freeze_parameters()
    if kind is not YesNoModel:
        model.fit_normalization(torch.arange(1, 31), torch.arange(1, 31))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * weight.requires_grad)
    if full:
        model.include_base_weights()
    questions = questions_for(model, tokenizer, liked)
    expected = logits_of(model, questions, range(20))
    model.save_pretrained(tmp_path / "tuned")
    size = sum(file.stat().st_size for file in (tmp_path / "tuned").glob("*.safetensors"))
    whole = sum(weight.numel() * 4 for weight in model.parameters())
    language = sum(weight.numel() * 4 for weight in model.language.parameters())
    assert size >= whole if full else "language" in trained or size < whole - 0.9 * language + 20_000
    if full:
        (tmp_path / "base").rename(tmp_path / "away")
    again = kind.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits_of(again, questions, range(20)), expected)
    assert not again.training and type(again) is kind


def test_what_does_not_fit_is_refused(liked, tmp_path):
    model, tokenizer = make_yes_no_model(CoLLM)
    make_model("llama", len(tokenizer) + 8, spread=3).save_pretrained(tmp_path / "base")
    model.cf_model.save_pretrained(tmp_path / "cf_model")
    model.config.base_model, model.config.cf_model = str(tmp_path / "base"), str(tmp_path / "cf_model")
    model.save_pretrained(tmp_path / "tuned")
    CoLLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        model.cf_model.user_embedding.weight.add_(1)
    model.cf_model.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is not the model that .* was trained with; see --cf_model"):
        CoLLM.from_pretrained(tmp_path / "tuned", cf_model=str(tmp_path / "other"))
    make_model("gpt2", len(tokenizer) + 8).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="no layer 'q_proj'"):
        CoLLM.from_pretrained(tmp_path / "tuned", base_model=str(tmp_path / "gpt2"))
    (tmp_path / "tuned/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="model.safetensors: its weights cannot be read"):
        CoLLM.from_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/model.safetensors").unlink()
    with pytest.raises(InputError, match="its weights do not match its config"):
        CoLLM.from_pretrained(tmp_path / "tuned")


@pytest.mark.parametrize("kind", [YesNoModel, CoLLM, CoRA])
def test_a_base_in_4_bits(liked, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = make_yes_no_model(kind, "llama-wide")
    make_model("llama-wide", len(tokenizer) + 8, spread=3).save_pretrained(tmp_path / "base")
    model.cf_model is None or model.cf_model.save_pretrained(tmp_path / "cf_model")
    model.config.base_model, model.config.cf_model = str(tmp_path / "base"), str(tmp_path / "cf_model")
    model.save_pretrained(tmp_path / "tuned")
    small = kind.from_pretrained(tmp_path / "tuned", load_in_4bit=True)
    assert {type(m).__name__ for m in small.language.modules()} & {"Linear4bit"}
    questions = questions_for(model, tokenizer, liked)
    expected = logits_of(small, questions, range(6))
    assert expected.isfinite().all() and expected.std() > 1e-3
    small.train()(**batch_of(questions, range(6))).loss.backward()
    without = [name for name, w in small.named_parameters() if w.requires_grad and w.grad is None]
    assert not without
    assert all(w.grad.isfinite().all() for w in small.parameters() if w.requires_grad)
    small.eval().save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert again.config.load_in_4bit and torch.equal(logits_of(again, questions, range(6)), expected)
    if kind is CoRA:
        with pytest.raises(ValueError, match="4 bits cannot be added to"):
            small.merge(torch.tensor([1]), torch.tensor([1]))
