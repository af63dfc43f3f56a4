"""Codes become words of any model's vocabulary, one token each, with a meaning, tied or not."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, Gemma3Config, GPT2Config

from reclingua.inference.loading import check_context_length
from reclingua.models.language import context_length, load_model, load_tokenizer
from reclingua.models.vocabulary import code_tokens, extend_vocabulary, index_token_ids
from reclingua.utils import hub
from reclingua.utils.errors import InputError
from tests.helpers.models import make_model, make_tokenizer

INDEX = {str(i): [f"<a_{i // 3}>", f"<b_{i % 3}>"] for i in range(9)}
TEXTS = {str(i): f"history number {'user' if i < 3 else 'Response'} {i}" for i in range(9)}


@pytest.mark.parametrize("bos", [True, False])
def test_every_code_is_one_token_wherever_it_stands(architecture, bos):
    tokenizer = make_tokenizer(bos)
    model = make_model(architecture, len(tokenizer))
    words = len(tokenizer)
    assert extend_vocabulary(model, tokenizer, INDEX, TEXTS) == 6
    assert len(tokenizer) == words + 6 <= model.get_input_embeddings().weight.shape[0]
    ids = index_token_ids(tokenizer, INDEX)
    assert len({token for codes in ids.values() for token in codes}) == 6
    for text in ("{}", "a user had {}", "{}, {}", "({})"):
        encoded = tokenizer(text.format("<a_1><b_2>", "<a_0><b_0>"), add_special_tokens=False).input_ids
        assert [token for token in encoded if token >= words] == ids["5"] + (ids["0"] if text.count("{}") > 1 else [])


def test_new_rows_carry_meaning_and_old_rows_stay(architecture):
    tokenizer = make_tokenizer(bos=False)
    model = make_model(architecture, len(tokenizer))
    head_before = model.get_output_embeddings().weight.detach().clone()
    before = model.get_input_embeddings().weight.detach().clone()
    words = len(tokenizer)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    extend_vocabulary(model, tokenizer, INDEX, TEXTS)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied == (architecture in {"llama-tied", "qwen2", "gpt2", "gemma"})
    assert torch.equal(embedding[:words], before[:words]) and torch.equal(head[:words], head_before[:words])
    for weight in (embedding, head):
        new = weight[words : words + 6].detach()
        assert 0.3 < new.std() / weight[:words].std() < 3
        assert torch.pdist(new).min() > 0.1 * torch.pdist(weight[:words].detach()).mean()
        # Items of <a_1> and <a_2> are told in the same words, those of <a_0> in others.
        assert torch.dist(new[1], new[2]) < torch.dist(new[0], new[1])


def test_without_texts_the_rows_look_like_the_others():
    tokenizer = make_tokenizer(bos=False)
    model = make_model("llama", len(tokenizer))
    extend_vocabulary(model, tokenizer, INDEX)
    new = model.get_input_embeddings().weight[-6:]
    assert 0.5 < new.std() / model.get_input_embeddings().weight[:-6].std() < 2


def test_a_tuned_model_is_not_extended_twice(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    model = make_model("llama-tied", len(tokenizer))
    extend_vocabulary(model, tokenizer, INDEX)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    again, words = load_model(tmp_path), load_tokenizer(tmp_path)
    assert extend_vocabulary(again, words, INDEX) == 0
    assert index_token_ids(words, INDEX) == index_token_ids(tokenizer, INDEX)
    ids = torch.tensor([[1, 5, *index_token_ids(words, INDEX)["4"]]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("taken", ["user", "<s>"])
def test_a_code_that_is_a_word_already(taken):
    tokenizer = make_tokenizer(bos=True)
    model = make_model("llama", len(tokenizer))
    assert taken in tokenizer.get_vocab()
    with pytest.raises(InputError, match=f"index token '{taken}' of item '4' is already a word"):
        extend_vocabulary(model, tokenizer, INDEX | {"4": [taken, "<b_1>"]})
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


def test_another_index_than_the_model_knows():
    with pytest.raises(InputError, match="'<a_0>' of item '0' is not in the vocabulary"):
        index_token_ids(make_tokenizer(bos=False), INDEX)


def test_codes_in_order():
    assert code_tokens({"x": ["<a_10>", "<b_0>"], "y": ["<a_9>", "<b_2>"]}) == ["<a_9>", "<a_10>", "<b_0>", "<b_2>"]


def test_no_model_there(tmp_path):
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no causal language model"):
        load_model(tmp_path)


def test_a_hub_name_without_a_network_fails_at_once(monkeypatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    for load in (load_tokenizer, load_model):
        with pytest.raises(InputError, match="^nobody/no-such-model: no such folder, not in the cache of the hub"):
            load("nobody/no-such-model")
        with pytest.raises(InputError, match="no such folder, and not the name of a model on the hub"):
            load("ckpt/no/such/folder")


def test_an_unreachable_hub_is_noticed_within_seconds(monkeypatch):
    """Nothing answers, not even the server that knows the name."""
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: time.sleep(60)))
    begun = time.monotonic()
    assert not hub.hub_is_reachable.__wrapped__(patience=0.1) and time.monotonic() - begun < 5


def test_code_of_a_model_is_run_on_request_alone(tmp_path, monkeypatch):
    """The library would ask on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    make_model("llama", 40).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own"\n\n\n'
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(InputError, match="Python code of its own, which is not run; read it, and add --trust_remote"):
        load_model(tmp_path)
    monkeypatch.setattr(hub, "_trusts_remote_code", False)  # restored at the end
    hub.trust_remote_code(True)
    assert type(load_model(tmp_path)).__name__ == "Own"


def test_the_length_that_a_text_model_inside_reads():
    text = {"vocab_size": 40, "max_position_embeddings": 512}
    for config, length in (
        (Gemma3Config(text_config=text), 512),
        (GPT2Config(n_positions=96), 96),
        (BloomConfig(), None),
    ):
        assert context_length(SimpleNamespace(config=config)) == length
    with pytest.raises(InputError, match="reads at most 512 tokens"):
        check_context_length(SimpleNamespace(config=Gemma3Config(text_config=text)), 100_000)


def test_smollm2_from_its_package(smollm2):
    """The converted model speaks, and its tokenizer splits numbers into digits."""
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 1995") == ["in", "Ġ", "1", "9", "9", "5"]
    assert model.config.tie_word_embeddings and tokenizer.model_max_length == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert extend_vocabulary(model, tokenizer, INDEX, TEXTS) == 6
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
