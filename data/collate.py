"""Samples -> token ids and labels: the phrasing is drawn here, per sample and epoch, and batches are padded."""

import random
from collections.abc import Collection
from functools import cached_property

import datasets
import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from data.prompts import Phrasing
from data.tasks import stretch

IGNORE = -100


class Instructions(torch.utils.data.Dataset):
    """A `datasets.Dataset` of samples (data/tasks.py) as token ids and labels.

    Which phrasing a sample gets, and where a long history is cut, depends on seed, epoch and sample alone: the same
    in every run, different in every epoch (`set_epoch`).

    Args:
        index_tokens: ids of the code tokens; in a history sample these are what is learned.
        phrasings_per_sample: how many phrasings each sample gets in an epoch, LC-Rec's `train_prompt_sample_num`.
        only_response: labels on the response alone, else on every token.
        add_prefix: number the items of a history: "1. <a_3>...".
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        prompts: dict[str, list[Phrasing]],
        index_tokens: Collection[int],
        max_his_len: int,
        his_sep: str,
        add_prefix: bool = False,
        only_response: bool = True,
        phrasings_per_sample: int = 1,
        seed: int = 0,
    ):
        self.samples, self.tokenizer, self.prompts = samples, tokenizer, prompts
        self.index_tokens = frozenset(index_tokens)
        self.max_his_len, self.his_sep, self.add_prefix = max_his_len, his_sep, add_prefix
        self.only_response, self.repeat, self.seed = only_response, phrasings_per_sample, seed
        self.epoch = 0
        self._rims: dict[tuple[str, int, bool], list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples) * self.repeat

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        if i >= len(self):
            raise IndexError(i)
        sample = self.samples[i % len(self.samples)]
        phrasing = self.prompts[sample["task"]][self._drawn(i, sample["task"])]
        if sample["target"]:
            return self.answered(sample, phrasing)
        shift = self._shift(sample["user"])
        items = stretch(sample["history"], sample["part"], sample["parts"], self.max_his_len, shift)
        return self._whole(items, phrasing)

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Tokens of each sample in this epoch, int64 [samples]; or in whichever epoch it is `longest`.

        No sample is written out for it: index tokens stand for themselves whatever surrounds them, so that what a
        phrasing adds depends on the number of items alone.
        """
        found = []
        for i in range(len(self)):
            task, user, items, target, part, parts = self._sizes[i % len(self._sizes)]
            if not target and longest:
                items = sorted(items)[-self.max_his_len - 1 :]
            elif not target:
                items = stretch(items, part, parts, self.max_his_len, self._shift(user))
            around = self._around(task, len(items), target > 0)
            found.append(sum(items) + target + (max(around) if longest else around[self._drawn(i, task)]))
        return np.array(found, dtype=np.int64)

    @cached_property
    def _sizes(self) -> list[tuple]:
        """Of each sample: task, user, tokens of the items of its history and of its target, part, parts."""
        columns = [self.samples[name] for name in ("task", "user", "history", "target", "part", "parts")]
        distinct = sorted({item for items in columns[2] for item in items} | set(columns[3]))
        encoded = self.tokenizer(distinct, add_special_tokens=False).input_ids
        tokens = dict(zip(distinct, map(len, encoded), strict=True))
        return [
            (task, user, [tokens[item] for item in items], tokens[target], part, parts)
            for task, user, items, target, part, parts in zip(*columns, strict=True)
        ]

    def _around(self, task: str, items: int, answered: bool) -> list[int]:
        """Tokens of a sample besides its items and its target, with each phrasing of the task."""
        if (task, items, answered) not in self._rims:
            stand_in = next(iter(self.samples))["history"][0]
            sample = {"task": task, "history": [stand_in] * items, "target": stand_in}
            own = len(self.tokenizer(stand_in, add_special_tokens=False).input_ids) * (items + answered)
            self._rims[task, items, answered] = [
                len((self.answered(sample, p) if answered else self._whole(sample["history"], p))["input_ids"]) - own
                for p in self.prompts[task]
            ]
        return self._rims[task, items, answered]

    def _drawn(self, i: int, task: str) -> int:
        """Which phrasing sample i has in this epoch."""
        return random.Random(f"{self.seed} {self.epoch} {i}").randrange(len(self.prompts[task]))

    def _shift(self, user: str) -> float:
        """Where the stretches of a user begin in this epoch."""
        return random.Random(f"{self.seed} {self.epoch} {user}").random()

    def prompt(self, sample: dict, phrasing: Phrasing) -> str:
        """The text up to where the item is to be given."""
        text = phrasing.prompt.format(history=self._joined(sample["history"]))
        return text if sample["task"] == "seqrec" else text + self._gap(len(sample["history"]))

    def answered(self, sample: dict, phrasing: Phrasing) -> dict[str, list[int]]:
        """Prompt and response, as at test: the response ends with the end token unless it is part of a history."""
        response = phrasing.response.format(target=sample["target"]) if phrasing.response else sample["target"]
        prompt = encode_prompt(self.tokenizer, self.prompt(sample, phrasing))
        ids = self.tokenizer(response, add_special_tokens=False).input_ids
        if sample["task"] == "seqrec":
            ids = [*ids, self.tokenizer.eos_token_id]
        labels = [IGNORE] * len(prompt) if self.only_response else prompt
        return {"input_ids": prompt + ids, "labels": [*labels, *ids]}

    def _whole(self, items: list[str], phrasing: Phrasing) -> dict[str, list[int]]:
        """Items one after another, the codes of every item after the first as labels."""
        ids = encode_prompt(self.tokenizer, phrasing.prompt.format(history=self._joined(items)))
        if not self.only_response:
            return {"input_ids": ids, "labels": list(ids)}
        given = encode_prompt(self.tokenizer, phrasing.prompt.format(history=self._joined(items[:1])))
        labels = [token if token in self.index_tokens else IGNORE for token in ids]
        labels[: len(given)] = [IGNORE] * len(given)
        return {"input_ids": ids, "labels": labels}

    def _joined(self, items: list[str]) -> str:
        return self.his_sep.join(self._number(at) + item for at, item in enumerate(items, start=1))

    def _gap(self, length: int) -> str:
        """What stands between the last item of a history and the next one."""
        return (self.his_sep if length else "") + self._number(length + 1)

    def _number(self, at: int) -> str:
        return f"{at}. " if self.add_prefix else ""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the tokenizer's own beginning (a BOS where it has one), never its end: an answer follows."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """int64 [rows, longest]."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(r)) + r if left else r + [value] * (longest - len(r)) for r in rows]
    return torch.tensor(filled, dtype=torch.long)


class Collator:
    """Training samples -> a batch of int64 tensors, right-padded: input_ids, labels, lengths (tokens of each sample).

    With `packing` samples are laid end to end in rows no longer than the longest of them; `position_ids` begin anew
    with each sample, by which transformers keeps their attention apart. With `one_row` they make a single row, with
    the borders as flash attention reads them (int32 cu_seq_lens_q and _k [samples + 1]; max_length_q and _k).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, packing: bool = False, one_row: bool = False):
        self.tokenizer, self.packing, self.one_row = tokenizer, packing, one_row

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        if self.packing:
            rows = [samples] if self.one_row else self._rows(samples)
            places = [[place for sample in row for place in range(len(sample["input_ids"]))] for row in rows]
            how = {"position_ids": pad(places, 0)}
            if self.one_row:
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
