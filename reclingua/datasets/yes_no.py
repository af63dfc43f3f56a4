"""Rows of who liked what -> questions as token ids: will this user like this item, Yes or No?

A prompt is put together from pieces that are encoded one by one: the words of a phrasing, titles, codes. A title can
thus never run into a special token or a soft token beside it, and how long a prompt is, is known without writing it.
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

USER, ITEM, LIKED = 0, 1, 2  # whose soft tokens: the user's, the item's, the first liked item's; the others follow
CODE_FORMATS = ("bits", "ip")
NO_HISTORY = "nothing so far"


class Answer(NamedTuple):
    """Token ids of the two answers."""

    yes: int
    no: int


def yes_no_token_ids(tokenizer: PreTrainedTokenizerBase, ending: str) -> tuple[list[int], Answer]:
    """The last words of a prompt as token ids, and the tokens that say Yes and No right after them.

    Whether a space belongs to the answer, stands alone, or melts into the words before it, is the tokenizer's own
    matter: what both continuations begin with is prompt, where they part is the answer.

    Raises:
        InputError: the tokenizer begins both words with the same token, or has no token for one.
    """
    gap = "" if not ending or ending[-1].isspace() else " "
    yes, no = (tokenizer(ending + gap + word, add_special_tokens=False).input_ids for word in ("Yes", "No"))
    alone = tokenizer(ending, add_special_tokens=False).input_ids
    common = len(os.path.commonprefix([yes, no]))
    same = common in (len(yes), len(no)) or tokenizer.unk_token_id in (yes[common], no[common])
    if same or (yes[: len(alone)] == alone and tokenizer.decode(yes[len(alone) : common]).strip()):
        raise InputError(
            f"this tokenizer does not tell Yes from No by their first token after {ending[-20:]!r}; "
            "end the phrasing in another way (--prompt_file) or take another base model"
        )
    return yes[:common], Answer(yes[common], no[common])


def code_text(bits: torch.Tensor, how: str) -> str:
    """A binary code, bool [bits], as text: "0110...", or with `how` "ip" its bytes in decimal, "172.16.254.3"."""
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    if how == "bits":
        return text
    return ".".join(str(int(text[at : at + 8], 2)) for at in range(0, len(text), 8))


class YesNoDataset(torch.utils.data.Dataset):
    """A part of a preference dataset as questions.

    A sample has input_ids; soft (which soft token stands at a place: 0 none, else 1 + whose * soft_tokens + number of
    the token, whose as in USER, ITEM, LIKED + place in `liked`); shared (how many tokens come before anything about
    the item); user, item; liked (items whose titles a prompt shows, 0 in front); read (liked items for a collaborative
    model); with_ids (whether user and item may be made use of); label.

    Args:
        part: its rows.
        titles: item id -> title.
        phrasings: one is drawn for each row and epoch; without `draw` it is the first.
        max_his_len: liked items whose titles are shown at most, the last ones.
        limit: tokens of a prompt at most. A longer one is cut at its history; `cut` counts these after `lengths`.
        soft_tokens: soft tokens for each id.
        read_length: liked items that the collaborative model reads.
        codes: texts of users and items by id, for phrasings that ask for codes.
        cold_template: for rows whose user or item training did not know; it has no ids.

    Raises:
        InputError: phrasings that end so that Yes is another token each time; a question that is too long even
            without any history.
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
        self.draw, self.seed, self.epoch, self.cut = draw, seed, 0, 0
        self._plain = sanitizer(tokenizer)
        self._encoded = lru_cache(2**18)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        written = [*templates, cold_template] if cold_template else templates
        pieces, answers = zip(*(self._pieces(template.prompt) for template in written), strict=True)
        if len(set(answers)) > 1:
            odd = next(number for number, answer in enumerate(answers) if answer != answers[0])
            raise InputError(f"phrasing {odd} ends so that Yes is another token than after phrasing 0: end them alike")
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
        cold = self.cold_pieces is not None and not self.warm[i]
        return {
            **self._write(i, self.cold_pieces if cold else self.pieces[self._drawn(i)]),
            "user": self.users[i],
            "item": self.items[i],
            "liked": self.shown[i],
            "with_ids": not cold,
            "label": self.labels[i],
        } | ({} if self.read is None else {"read": self.read[i]})

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Tokens of each question in this epoch, int64 [rows]; or in whichever epoch it is `longest`."""
        if not longest:
            return np.array([len(self[i]["input_ids"]) for i in range(len(self))], dtype=np.int64)
        self.cut, found = 0, []
        for i in range(len(self)):
            written = [self._write(i, pieces) for pieces in self.pieces]
            found.append(max(len(each["input_ids"]) for each in written))
            self.cut += any(each["cut"] for each in written)
        return np.array(found, dtype=np.int64)

    def _drawn(self, i: int) -> int:
        return random.Random(f"{self.seed} {self.epoch} {i}").randrange(len(self.pieces)) if self.draw else 0

    def _pieces(self, prompt: str) -> tuple[list[tuple[list[int], str | None, str]], Answer]:
        """A phrasing as (words before a field, the field, a space that belongs to what fills it), and its answer."""
        parts = [(words, field) for words, field, *_ in Formatter().parse(prompt)]
        ending = parts.pop()[0] if parts[-1][1] is None else ""
        pieces = []
        for words, field in parts:
            # A space goes with the word that follows it, as tokenizers would have it; a soft token takes none.
            text = field not in ("user", "item", "history_ids") or self.codes
            gap = " " if text and words.endswith(" ") else ""
            words = words[: len(words) - len(gap)]
            ids = self._encoded(words) if pieces else encode_prompt(self.tokenizer, words)
            pieces.append((ids, field, gap))
        ids, answer = yes_no_token_ids(self.tokenizer, ending)
        return [*pieces, (ids, None, "")], answer

    def _write(self, i: int, pieces: list) -> dict:
        """The prompt of row i, its history as long as the limit allows."""
        shown = np.flatnonzero(self.shown[i])
        for cut in range(len(shown) + 1):
            prompt = self._fill(i, pieces, shown[cut:].tolist())
            if len(prompt["input_ids"]) <= self.limit:
                return prompt | {"cut": cut > 0}
        user, item = int(self.users[i]), int(self.items[i])
        raise InputError(
            f"the question about user {user} and item {item} has {len(prompt['input_ids'])} tokens without any "
            f"history, the model reads {self.limit}: shorten the title {self.titles[item][:40]!r} or the phrasings"
        )

    def _fill(self, i: int, pieces: list, places: list[int]) -> dict:
        """The prompt of row i with those liked items that stand at `places` of `shown`."""
        ids, soft, shared = [], [], None
        for words, field, gap in pieces:
            ids += words
            if shared is None and (field in ("title", "item", "history_ids") or field == "user" and not self.codes):
                shared = len(ids)
            if field == "history":
                quoted = [f'"{self._title(self.shown[i, place])}"' for place in places] or [NO_HISTORY]
                for before, title in zip([gap] + [self.his_sep] * len(quoted), quoted, strict=False):
                    ids += self._encoded(before + title)
            elif field == "title":
                ids += self._encoded(gap + self._title(self.items[i]))
            elif field in ("user", "item") and self.codes:
                whose, number = (USER, self.users[i]) if field == "user" else (ITEM, self.items[i])
                ids += self._encoded(gap + self.codes[whose][int(number)])
            elif field is not None:
                soft += [0] * (len(ids) - len(soft))
                whose = {"user": [USER], "item": [ITEM]}.get(field) or [LIKED + place for place in places]
                soft += [1 + who * self.soft_tokens + token for who in whose for token in range(self.soft_tokens)]
                ids = ids + [self.tokenizer.pad_token_id] * (len(soft) - len(ids))
        return {"input_ids": ids, "soft": soft + [0] * (len(ids) - len(soft)), "shared": shared or 0}

    def _title(self, item: int) -> str:
        return self._plain(self.titles[int(item)])


class YesNoCollator:
    """Yes/No samples -> a batch, padded on the right, as `reclingua/models/yes_no.py` takes it.

    int64 input_ids, soft [batch, length]; last [batch], where each prompt ends; shared [batch], how many of its tokens
    are the same whatever item is asked about; users, items [batch]; liked [batch, max_his_len]; histories
    [batch, read_length]; bool with_ids [batch]; float32 labels [batch]; lengths [batch], tokens of each prompt.
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
