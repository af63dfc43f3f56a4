"""Item indices in tokenizers of every kind: one token a code, wherever it stands and whatever the tokenizer adds."""

import json

import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing

from reclingua.datasets.collators import encode_prompt
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.tasks import held_out_samples
from reclingua.models.language import load_tokenizer
from reclingua.models.vocabulary import code_tokens, extend_vocabulary, index_token_ids
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.toys import write_toy

WORDS = ["A user had these items, oldest first: which comes next?", "### Instruction: ### Response: Toy number 7 4 2"]
KINDS = ("byte-level", "byte-level, BOS", "byte-level, EOS", "byte-level, more words")
KINDS += ("llama", "llama, legacy", "vicuna")


def tokenizer_of(kind, folder):
    """A small tokenizer of that kind, loaded from a folder as a user's would be."""
    if kind.startswith("byte-level"):
        tokenizer = make_tokenizer(bos="BOS" in kind)
        if "EOS" in kind:
            ends = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
            tokenizer.backend_tokenizer.post_processor = ends
        if "more" in kind:
            tokenizer.add_tokens(["<|chat|>", "<tool>"])
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder)
    (folder / "words.txt").write_text("\n".join(WORDS * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=380, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": kind != "llama", "add_bos_token": True, **special}
    config |= {"pad_token": "<unk>", "model_max_length": 2048} if kind == "vicuna" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_the_same_tokens_everywhere(tmp_path, kind):
    """Alone, in a history, in a prompt, after a reload; and what a search is given ends where an answer begins."""
    tokenizer = tokenizer_of(kind, tmp_path)
    write_toy(tmp_path)
    dataset = open_interactions(tmp_path, "toy", ["index"])
    extend_vocabulary(make_model("llama", len(tokenizer)), tokenizer, dataset.index)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, load_tokenizer(tmp_path / "saved")):
        ids = index_token_ids(each, dataset.index)
        codes = {token for tokens in ids.values() for token in tokens}
        assert len(codes) == len(code_tokens(dataset.index)) == 6
        samples = held_out_samples(dataset, "test", "seqrec", max_his_len=3)
        templates = [PromptTemplate("{history}", "{target}"), PromptTemplate("After {history}: what? ", "{target}")]
        for his_sep in (", ", "", " then "):
            told = InstructionDataset(samples, dataset, each, {"seqrec": templates}, ids, 3, his_sep)
            for row in samples:
                history = [token for item in row["history"] for token in ids[item]]
                for template in templates:
                    sample = told.encode(row, template)
                    prompt = encode_prompt(each, told.render_prompt(row, template))
                    assert [token for token in prompt if token in codes] == history
                    assert sample["input_ids"] == [*prompt, *ids[row["item"]], each.eos_token_id]
                    assert each.eos_token_id not in prompt
                    first = [each.bos_token_id] if kind == "byte-level, BOS" or not kind.startswith("byte") else []
                    assert prompt[: len(first)] == first and prompt.count(each.bos_token_id) == len(first)
