"""Yes/No dataset: ratings as questions in token ids, "will this user like this item?".

A prompt is assembled from pieces that are encoded one by one: the text of a prompt template, titles, codes. A title
thus never merges with a special token or a soft token next to it.
"""

import os
import random
from functools import lru_cache
from string import Formatter
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import encode_prompt, pad, sanitizer
from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.ratings import liked_history, to_numpy
from reclingua.utils.errors import InputError

USER, ITEM, LIKED = 0, 1, 2  # owners of soft tokens: user, item, first liked item; LIKED + n is liked item n
CODE_FORMATS = ("bits", "ip")
NO_HISTORY = "nothing so far"


class Answer(NamedTuple):
    """Token ids of the two answers."""

    yes: int
    no: int


class Piece(NamedTuple):
    """Piece of a prompt template: the text before a field, the field, and a space that its text starts with."""

    ids: list[int]
    field: str | None
    gap: str


def yes_no_token_ids(tokenizer: PreTrainedTokenizerBase, ending: str) -> tuple[list[int], Answer]:
    """Return the end of a prompt as token ids, and the tokens of Yes and No right after it.

    A tokenizer can attach the space to the answer, to the text before it, or keep it apart. So both continuations are
    encoded as a whole: their common prefix is the prompt, the first tokens that differ are the answers.

    Raises:
        InputError: the tokenizer starts both words with the same token, or has no token for one.
    """
    gap = "" if not ending or ending[-1].isspace() else " "
    yes, no = (tokenizer(ending + gap + word, add_special_tokens=False).input_ids for word in ("Yes", "No"))
    alone = tokenizer(ending, add_special_tokens=False).input_ids
    common = len(os.path.commonprefix([yes, no]))
    same = common in (len(yes), len(no)) or tokenizer.unk_token_id in (yes[common], no[common])
    if same or (yes[: len(alone)] == alone and str(tokenizer.decode(yes[len(alone) : common])).strip()):
        raise InputError(
            f"Yes and No start with the same token of this tokenizer after {ending[-20:]!r}; "
            "end the prompt template in another way (--prompt_file) or take another base model"
        )
    return yes[:common], Answer(yes[common], no[common])


def format_code(bits: torch.Tensor, code_format: str) -> str:
    """Return a binary code, bool [bits], as "bits", "0110...", or as "ip", its bytes in decimal, "172.16.254.3"."""
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    if code_format == "bits":
        return text
    return ".".join(str(int(text[start : start + 8], 2)) for start in range(0, len(text), 8))


class YesNoDataset(torch.utils.data.Dataset):
    """Torch dataset of questions about rated items.

    A sample has input_ids; soft (number of the soft token at each position: 0 none, else 1 + owner * soft_tokens +
    number among the owner's, see USER, ITEM, LIKED); shared (number of tokens before the first that depends on the
    item); user, item; liked (items whose titles the prompt shows, padded with 0 on the left); read (liked items for
    the collaborative model); with_ids (whether user and item can be used); label.

    Args:
        part: rows of a `RatingsDataset`.
        titles: item id -> title.
        templates: prompt templates; one is drawn for each row and epoch, or, without `draw`, the first is used.
        max_his_len: largest number of liked items whose titles are shown, the last ones.
        limit: largest number of tokens of a prompt. A longer one loses the oldest items of its history;
            `num_truncated` counts these after `lengths`.
        soft_tokens: number of soft tokens for each id.
        read_length: number of liked items that the collaborative model reads.
        codes: texts of users and items by id, for prompt templates with codes.
        cold_template: prompt template without ids, for rows whose user or item is not in train.

    Raises:
        InputError: prompt templates after which Yes is not the same token; a question that is too long even without
            any history.
    """

    def __init__(
        self,
        part: Dataset,
        titles: dict[int, str],
        tokenizer: PreTrainedTokenizerBase,
        templates: list[PromptTemplate],
        max_his_len: int,
        his_sep: str,
        limit: int,
        soft_tokens: int = 1,
        read_length: int = 0,
        codes: tuple[dict[int, str], dict[int, str]] | None = None,
        cold_template: PromptTemplate | None = None,
        draw: bool = False,
        seed: int = 0,
    ):
        self.titles, self.tokenizer, self.codes = titles, tokenizer, codes
        self.max_his_len, self.his_sep, self.limit, self.soft_tokens = max_his_len, his_sep, limit, soft_tokens
        self.draw, self.seed, self.epoch, self.num_truncated = draw, seed, 0, 0
        self._sanitize = sanitizer(tokenizer)
        self._encode = lru_cache(2**18)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        all_templates = [*templates, cold_template] if cold_template else templates
        pieces, answers = zip(*(self._split(template.prompt) for template in all_templates), strict=True)
        if len(set(answers)) > 1:
            other = next(number for number, answer in enumerate(answers) if answer != answers[0])
            raise InputError(
                f"after prompt template {other} Yes is another token than after prompt template 0: end them alike"
            )
        self.pieces, self.cold_pieces = pieces[: len(templates)], pieces[-1] if cold_template else None
        self.answer: Answer = answers[0]
        self.users, self.items, self.labels, self.warm = (
            to_numpy(part, name).astype(np.int64) for name in ("uid", "iid", "label", "not_cold")
        )
        self.shown = liked_history(part, max_his_len)
        self.read = liked_history(part, read_length) if read_length else None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, i: int) -> dict:
        if i >= len(self):
            raise IndexError(i)
        pieces = None if self.warm[i] else self.cold_pieces
        return {
            **self._write(i, pieces if pieces is not None else self.pieces[self._draw_template(i)]),
            "user": self.users[i],
            "item": self.items[i],
            "liked": self.shown[i],
            "with_ids": pieces is None,
            "label": self.labels[i],
        } | ({} if self.read is None else {"read": self.read[i]})

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Return the tokens of each question, int64 [rows], in this epoch, or in the epoch where it is `longest`."""
        if not longest:
            return np.array([len(self[i]["input_ids"]) for i in range(len(self))], dtype=np.int64)
        self.num_truncated, lengths = 0, []
        for i in range(len(self)):
            prompts = [self._write(i, pieces) for pieces in self.pieces]
            lengths.append(max(len(prompt["input_ids"]) for prompt in prompts))
            self.num_truncated += any(prompt["truncated"] for prompt in prompts)
        return np.array(lengths, dtype=np.int64)

    def _draw_template(self, i: int) -> int:
        return random.Random(f"{self.seed} {self.epoch} {i}").randrange(len(self.pieces)) if self.draw else 0

    def _split(self, prompt: str) -> tuple[list[Piece], Answer]:
        """Return the pieces of a prompt template, and its answers."""
        parts = [(words, field) for words, field, *_ in Formatter().parse(prompt)]
        ending = parts.pop()[0] if parts[-1][1] is None else ""
        pieces: list[Piece] = []
        for words, field in parts:
            # Tokenizers attach a space to the word that follows it; a soft token has none.
            is_text = field not in ("user", "item", "history_ids") or self.codes
            gap = " " if is_text and words.endswith(" ") else ""
            words = words[: len(words) - len(gap)]
            ids = self._encode(words) if pieces else encode_prompt(self.tokenizer, words)
            pieces.append(Piece(ids, field, gap))
        ids, answer = yes_no_token_ids(self.tokenizer, ending)
        return [*pieces, Piece(ids, None, "")], answer

    def _write(self, i: int, pieces: list[Piece]) -> dict:
        """Return the prompt of row i, its history as long as the limit allows."""
        shown = np.flatnonzero(self.shown[i])
        for start in range(len(shown) + 1):
            prompt = self._fill(i, pieces, shown[start:].tolist())
            if len(prompt["input_ids"]) <= self.limit:
                return prompt | {"truncated": start > 0}
        user, item = int(self.users[i]), int(self.items[i])
        raise InputError(
            f"the question about user {user} and item {item} has {len(prompt['input_ids'])} tokens without any "
            f"history, the model reads {self.limit}: shorten the title {self.titles[item][:40]!r} or the prompts"
        )

    def _fill(self, i: int, pieces: list[Piece], places: list[int]) -> dict:
        """Return the prompt of row i with the liked items at `places` of `shown`."""
        ids: list[int] = []
        soft: list[int] = []
        shared = None
        for words, field, gap in pieces:
            ids += words
            if shared is None and (field in ("title", "item", "history_ids") or field == "user" and not self.codes):
                shared = len(ids)
            if field == "history":
                quoted = [f'"{self._title(self.shown[i, place])}"' for place in places] or [NO_HISTORY]
                for before, title in zip([gap] + [self.his_sep] * len(quoted), quoted, strict=False):
                    ids += self._encode(before + title)
            elif field == "title":
                ids += self._encode(gap + self._title(self.items[i]))
            elif field in ("user", "item") and self.codes:
                owner, number = (USER, self.users[i]) if field == "user" else (ITEM, self.items[i])
                ids += self._encode(gap + self.codes[owner][int(number)])
            elif field is not None:
                soft += [0] * (len(ids) - len(soft))
                owners = {"user": [USER], "item": [ITEM]}.get(field) or [LIKED + place for place in places]
                soft += [1 + owner * self.soft_tokens + token for owner in owners for token in range(self.soft_tokens)]
                ids = ids + [self.tokenizer.pad_token_id] * (len(soft) - len(ids))
        return {"input_ids": ids, "soft": soft + [0] * (len(ids) - len(soft)), "shared": shared or 0}

    def _title(self, item: int) -> str:
        return self._sanitize(self.titles[int(item)])


class YesNoCollator:
    """Collator of Yes/No samples: a batch padded on the right, the arguments of `YesNoModel.forward`.

    int64 input_ids, soft [batch, length]; last [batch], the last position of each prompt; shared [batch], number of
    first tokens that do not depend on the item; users, items [batch]; liked [batch, max_his_len]; histories
    [batch, read_length]; bool with_ids [batch]; float32 labels [batch]; int64 lengths [batch], tokens of each prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = {
            "input_ids": pad([sample["input_ids"] for sample in samples], self.tokenizer.pad_token_id),
            "soft": pad([sample["soft"] for sample in samples], 0),
            "last": lengths - 1,
            "shared": torch.tensor([sample["shared"] for sample in samples]),
            "with_ids": torch.tensor([sample["with_ids"] for sample in samples]),
            "labels": torch.tensor([float(sample["label"]) for sample in samples]),
            "lengths": lengths,
        }
        for name, key in (("users", "user"), ("items", "item"), ("liked", "liked"), ("histories", "read")):
            if key in samples[0]:
                batch[name] = torch.from_numpy(np.stack([sample[key] for sample in samples]))
        return batch
