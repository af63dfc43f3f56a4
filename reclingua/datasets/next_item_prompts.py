"""Prompts before the training items of each user: what grpo.py makes lists for, and the item that came next."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import IGNORE, pad, prompt_batch
from reclingua.datasets.instructions import InstructionDataset


class NextItemPrompts(torch.utils.data.Dataset):
    """Torch dataset of prompts: input_ids, target (an item number) and seen (numbers of the user's earlier items).

    Args:
        instructions: samples of `next_item_samples`, in their order, with labels on the response only.
        numbers: item -> its number, as in the trie.
        with_seen: whether `seen` is filled; else it is empty.
    """

    def __init__(self, instructions: InstructionDataset, numbers: Mapping[str, int], with_seen: bool):
        self.instructions, self.numbers, self.with_seen = instructions, numbers, with_seen
        self.targets: list[str] = instructions.samples["item"][:]
        self.users: list[str] = instructions.samples["user"][:]
        self.positions: list[int] = []  # of each target in its user's history, from 1
        for row, user in enumerate(self.users):
            follows = row > 0 and self.users[row - 1] == user
            self.positions.append(self.positions[-1] + 1 if follows else 1)

    def __len__(self) -> int:
        return len(self.targets)

    def set_epoch(self, epoch: int) -> None:
        self.instructions.set_epoch(epoch)

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Return the tokens of each prompt and its response, see `InstructionDataset.lengths`."""
        return self.instructions.lengths(longest)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self.instructions[i]
        prompt = sample["input_ids"][: sample["labels"].count(IGNORE)]
        earlier = self.instructions.dataset.histories[self.users[i]][: self.positions[i]] if self.with_seen else []
        seen = [self.numbers[item] for item in dict.fromkeys(earlier)]
        return {"input_ids": prompt, "target": self.numbers[self.targets[i]], "seen": seen}


class PromptCollator:
    """Collator of prompts: left-padded input_ids and attention_mask, labels (targets, int64 [batch]), excluded (int64
    [batch, any], padded with -1) and lengths (tokens of each prompt)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            **prompt_batch(self.tokenizer, [sample["input_ids"] for sample in samples]),
            "labels": torch.tensor([sample["target"] for sample in samples]),
            "excluded": pad([sample["seen"] for sample in samples], -1),
            "lengths": torch.tensor([len(sample["input_ids"]) for sample in samples]),
        }
