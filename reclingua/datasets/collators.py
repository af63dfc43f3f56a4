"""What samples of every method share: how a text becomes token ids, and how samples become a padded batch."""

import re
from collections.abc import Callable

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORE = -100


def sanitizer(tokenizer: PreTrainedTokenizerBase, max_words: int | None = None) -> Callable[[str], str]:
    """A function that fits a text to stand in a prompt: one line, `max_words` words at most, and none of them a token
    with a meaning of its own, as the end token or an index token has."""
    meant = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, meant)) or r"(?!)")

    def plain(text: str) -> str:
        return pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", " ".join(text.split()[:max_words]))

    return plain


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the tokenizer's own beginning (a BOS where it has one), never its end: an answer follows."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """int64 [rows, longest]."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(r)) + r if left else r + [value] * (longest - len(r)) for r in rows]
    return torch.tensor(filled, dtype=torch.long)


class CausalLMCollator:
    """Training samples -> a batch of int64 tensors, right-padded: input_ids, labels, lengths (tokens of each sample).

    With `packing` samples are laid end to end in rows no longer than the longest of them; `position_ids` begin anew
    with each sample, by which transformers keeps their attention apart. With `one_row` they make a single row, with
    the borders as flash attention reads them (int32 cu_seq_lens_q and _k [samples + 1]; max_length_q and _k).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, packing: bool = False, flatten: bool = False):
        self.tokenizer, self.packing, self.flatten = tokenizer, packing, flatten

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        if self.packing:
            rows = [samples] if self.flatten else self._rows(samples)
            places = [[place for sample in row for place in range(len(sample["input_ids"]))] for row in rows]
            how = {"position_ids": pad(places, 0)}
            if self.flatten:
                starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                how |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
                how |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        else:
            rows = [[sample] for sample in samples]
            how = {"attention_mask": pad([[1] * length for length in lengths], 0)}
        ids = [[token for sample in row for token in sample["input_ids"]] for row in rows]
        # Nothing stands before a sample's first token from which it could be told, in a row least of all.
        labels = [[label for sample in row for label in (IGNORE, *sample["labels"][1:])] for row in rows]
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            **how,
            "labels": pad(labels, IGNORE),
            "lengths": torch.tensor(lengths),
        }

    def _rows(self, samples: list[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
        """Each sample, the longest first, in the first row that has room for it."""
        samples = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
        longest = len(samples[0]["input_ids"])
        rows: list[list] = []
        room: list[int] = []
        for sample in samples:
            length = len(sample["input_ids"])
            at = next((at for at, left in enumerate(room) if left >= length), len(rows))
            if at == len(rows):
                rows.append([])
                room.append(longest)
            rows[at].append(sample)
            room[at] -= length
        return rows


def prompt_batch(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> BatchEncoding:
    """Encoded prompts for a search: int64 input_ids and attention_mask [batch, length], padded on the left."""
    return BatchEncoding(
        {
            "input_ids": pad(prompts, tokenizer.pad_token_id, left=True),
            "attention_mask": pad([[1] * len(row) for row in prompts], 0, left=True),
        }
    )
