"""Semantic-ID tokens in the vocabulary of a language model."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AddedToken,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reclingua.utils.errors import InputError


def code_tokens(index: Mapping[str, list[str]]) -> list[str]:
    """Return every code token of the index once, level by level, codes in numeric order."""
    level_of = {code: level for codes in index.values() for level, code in enumerate(codes)}

    def order(code: str) -> tuple[int, int, str]:
        digits = "".join(filter(str.isdecimal, code))
        return level_of[code], int(digits or 0), code

    return sorted(level_of, key=order)


def index_token_ids(tokenizer: PreTrainedTokenizerBase, index: Mapping[str, list[str]]) -> dict[str, list[int]]:
    """Return item -> semantic ID as token ids; InputError if a code is not one token of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    unknown = ((item, code) for item, codes in index.items() for code in codes if code not in vocabulary)
    if (new := next(unknown, None)) is not None:
        item, code = new
        raise InputError(
            f"index token {code!r} of item {item!r} is not in the vocabulary of this model: it was tuned on another "
            "index; give the index file it was tuned with as --index_file"
        )
    return {item: [vocabulary[code] for code in codes] for item, codes in index.items()}


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add random rows to the embeddings of the model until every token has one."""
    rows = max(tokenizer.get_vocab().values()) + 1  # more than len(tokenizer) where ids have gaps
    embedding: Any = model.get_input_embeddings()
    if rows > len(embedding.weight):
        model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: Mapping[str, list[str]],
    texts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> int:
    """Add every code token to the vocabulary as one token and initialise its rows from item texts.

    The row of a code is the mean embedding of the text tokens of all items with that code, plus noise. The means are
    centred and scaled to the spread of the existing rows, since means of many tokens are nearly the same for all
    codes. An output head that is not tied to the input embeddings gets its rows in the same way.

    Args:
        texts: item -> text; without it the new rows are random with the mean and spread of the existing ones.

    Returns:
        Number of tokens added; 0 for a model that has them all, such as a tuned checkpoint.

    Raises:
        InputError: a code is already a token of the base model; some codes are new to a tuned model.
    """
    codes = code_tokens(index)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    learned = [code for code in codes if code in added and code not in tokenizer.all_special_tokens]
    if len(learned) == len(codes):
        return 0
    if learned:
        new = next(code for code in codes if code not in learned)
        item = next(item for item, tokens in index.items() if new in tokens)
        raise InputError(
            f"index token {new!r} of item {item!r} is new: this model was tuned on semantic IDs before, with "
            f"{len(learned):,} of these {len(codes):,} codes, and gets no further ones; give the item a semantic ID "
            "of known codes, give the index that the model was tuned with, or tune its base model instead"
        )
    if (taken := next((code for code in codes if code in vocabulary), None)) is not None:
        item = next(item for item, tokens in index.items() if taken in tokens)
        raise InputError(
            f"index token {taken!r} of item {item!r} is already a word of the base model's vocabulary; "
            "rename the codes, for example to <a_1>"
        )
    tokenizer.add_tokens([AddedToken(code, normalized=False, special=False) for code in codes])
    resize_embeddings(model, tokenizer)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(codes))
    old = torch.tensor(sorted(set(vocabulary.values()) - set(ids.tolist())))
    words = _words_of_codes(tokenizer, index, texts, codes) if texts else None
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        known = weight[old.to(weight.device)].float().cpu()
        mean, spread = known.mean(0), known.std(0).mean()
        rows = torch.randn(len(codes), known.shape[1], generator=generator)
        if words is not None:
            meanings = torch.stack([weight[word.to(weight.device)].float().cpu().mean(0) for word in words])
            meanings = meanings - meanings.mean(0)
            # Half noise: codes whose items share most of their words must still differ.
            rows = 0.5**0.5 * (rows + meanings / meanings.std().clamp(min=1e-9))
        weight[ids.to(weight.device)] = (mean + spread * rows).to(weight)
    return len(codes)


def _words_of_codes(
    tokenizer: PreTrainedTokenizerBase, index: Mapping[str, list[str]], texts: Mapping[str, str], codes: list[str]
) -> list[torch.Tensor]:
    """Return for each code the token ids of the texts of all items that contain it."""
    items = list(index)
    encoded = tokenizer([texts[item] for item in items], add_special_tokens=False, truncation=True, max_length=64)
    words: dict[str, list[int]] = {code: [] for code in codes}
    for item, ids in zip(items, encoded.input_ids, strict=True):
        for code in index[item]:
            words[code].extend(ids or [tokenizer.eos_token_id])
    return [torch.tensor(words[code]) for code in codes]
