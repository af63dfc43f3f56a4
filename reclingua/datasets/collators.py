"""Encoding and padding shared by all methods, and the collator of causal language modelling."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORE = -100  # label of a position without a target


def sanitizer(tokenizer: PreTrainedTokenizerBase, max_words: int | None = None) -> Callable[[str], str]:
    """Return a function that makes a text safe to stand in a prompt.

    The result is one line of at most `max_words` words and contains no added token of the tokenizer (an end token, a
    semantic-ID token): such a token is split by a space after its first character.
    """
    added = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, added)) or r"(?!)")

    def sanitize(text: str) -> str:
        return pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", " ".join(text.split()[:max_words]))

    return sanitize


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return token ids with the tokenizer's BOS, if it has one, and without its EOS: an answer follows."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """Return the rows as int64 [rows, longest], filled up with `value` on the right, or on the left."""
    longest = max(map(len, rows))
    padded = [[value] * (longest - len(r)) + r if left else r + [value] * (longest - len(r)) for r in rows]
    return torch.tensor(padded, dtype=torch.long)


class CausalLMCollator:
    """Collator of training samples: right-padded int64 input_ids and labels, and lengths (tokens of each sample).

    Args:
        packing: pack samples into rows no longer than the longest of them. `position_ids` start again at 0 with each
            sample, by which transformers keeps their attention apart.
        flatten: with `packing`, pack all samples into one row and add their boundaries as flash attention expects
            them: int32 cu_seq_lens_q and cu_seq_lens_k [samples + 1], int max_length_q and max_length_k.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, packing: bool = False, flatten: bool = False):
        self.tokenizer, self.packing, self.flatten = tokenizer, packing, flatten

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        attention: dict[str, Any]
        if self.packing:
            rows = [samples] if self.flatten else self._pack(samples)
            positions = [[position for sample in row for position in range(len(sample["input_ids"]))] for row in rows]
            attention = {"position_ids": pad(positions, 0)}
            if self.flatten:
                starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                attention |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
                attention |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        else:  # no mask: padding is on the right, where causal attention does not look
            rows, attention = [[sample] for sample in samples], {}
        ids = [[token for sample in row for token in sample["input_ids"]] for row in rows]
        # The first token of a sample is no target: in a packed row the sample before it would predict it.
        labels = [[label for sample in row for label in (IGNORE, *sample["labels"][1:])] for row in rows]
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            **attention,
            "labels": pad(labels, IGNORE),
            "lengths": torch.tensor(lengths),
        }

    def _pack(self, samples: list[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
        """Return rows of samples, first fit decreasing: each sample goes into the first row with room for it."""
        samples = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
        longest = len(samples[0]["input_ids"])
        rows: list[list] = []
        free: list[int] = []  # tokens left in each row
        for sample in samples:
            length = len(sample["input_ids"])
            index = next((index for index, tokens in enumerate(free) if tokens >= length), len(rows))
            if index == len(rows):
                rows.append([])
                free.append(longest)
            rows[index].append(sample)
            free[index] -= length
        return rows


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> BatchEncoding:
    """Return encoded prompts for a search: int64 input_ids and attention_mask [batch, length], padded on the left."""
    return BatchEncoding(
        {
            "input_ids": pad(prompts, tokenizer.pad_token_id, left=True),
            "attention_mask": pad([[1] * len(row) for row in prompts], 0, left=True),
        }
    )


def move_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on `device`, without waiting for copies from pinned memory."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
