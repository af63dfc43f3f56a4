"""Yes/No dataset: trees of ratings as questions in token ids, "will this user like this item?".

A prompt is assembled from pieces that are encoded one by one: the text of a prompt template, titles, codes. A title
thus never merges with a special token or a soft token next to it, and the trunk of a tree and one of its branches
are together the very tokens of a row's prompt.
"""

import os
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import encode_prompt, pad, sanitizer
from reclingua.datasets.prompts import PromptTemplate
from reclingua.datasets.ratings import history_items, liked_history, to_numpy
from reclingua.datasets.trees import Histories, group_rows, window_starts
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


class TreeTemplate(NamedTuple):
    """Prompt template cut where the rows of a tree begin to differ.

    Args:
        trunk: pieces that all rows share, the last of them {history} unless a field of the row comes before it.
        branch: the pieces after them.
    """

    trunk: list[Piece]
    branch: list[Piece]

    @property
    def shares_history(self) -> bool:
        """Whether the liked titles are in the trunk."""
        return bool(self.trunk) and self.trunk[-1].field == "history"


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
    """Torch dataset of trees of rated items, see `reclingua.datasets.trees`.

    A sample is a tree. Of each token: input_ids; position_ids; branch (0 in the trunk, else 1 + number of the row in
    the tree); visible (number of tokens of the trunk that a token of a branch sees); soft (number of the soft token: 0
    none, else 1 + owner * soft_tokens + number among the owner's, see USER, ITEM, LIKED). Of each row: last (place of
    the last token of its prompt); users, items; liked (items whose titles the prompt shows, padded with 0 on the
    left); read (liked items for the collaborative model); with_ids (whether user and item can be used); labels. And
    trunk, the number of tokens of the trunk.

    Args:
        part: rows of a `RatingsDataset`.
        titles: item id -> title.
        templates: prompt templates; one is drawn for each tree and epoch, or, without `draw`, the first is used.
        max_his_len: liked items in the window whose titles are shown.
        limit: largest number of tokens of a prompt. A longer one loses the oldest items of its history;
            `num_truncated` counts these.
        soft_tokens: number of soft tokens for each id.
        read_length: number of liked items that the collaborative model reads.
        codes: texts of users and items by id, for prompt templates with codes.
        row_texts: texts of other fields of the templates, by field, one of each row.
        cold_template: prompt template without ids, for rows whose user or item is not in train.
        history_window: how the window moves, see `window_starts`.
        rows_per_tree: largest number of rows of a tree; 1 for a model without tree attention.

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
        row_texts: Mapping[str, Sequence[str]] | None = None,
        cold_template: PromptTemplate | None = None,
        draw: bool = False,
        seed: int = 0,
        history_window: str = "sliding",
        rows_per_tree: int = 1,
    ):
        self.titles, self.tokenizer, self.codes, self.row_texts = titles, tokenizer, codes, row_texts or {}
        self.his_sep, self.limit, self.soft_tokens = his_sep, limit, soft_tokens
        self.draw, self.seed, self.epoch = draw, seed, 0
        self._sanitize = sanitizer(tokenizer)
        self._encode = lru_cache(2**18)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        all_templates = [*templates, cold_template] if cold_template else templates
        split, answers = zip(*(self._split(template.prompt) for template in all_templates), strict=True)
        if len(set(answers)) > 1:
            other = next(number for number, answer in enumerate(answers) if answer != answers[0])
            raise InputError(
                f"after prompt template {other} Yes is another token than after prompt template 0: end them alike"
            )
        self.templates: tuple[TreeTemplate, ...] = split[: len(templates)]
        self.cold_templates: tuple[TreeTemplate, ...] = split[len(templates) :]
        self.answer: Answer = answers[0]
        self.users, self.items, self.labels, warm = (
            to_numpy(part, name).astype(np.int64) for name in ("uid", "iid", "label", "not_cold")
        )
        self.is_cold = (warm == 0) & (cold_template is not None)
        self.histories = Histories(*history_items(part))
        lengths = np.diff(self.histories.offsets)
        starts = window_starts(lengths, max_his_len, history_window)
        self.starts = self._fitting_starts(starts)
        self.num_truncated = int((self.starts > starts).sum())
        self.shown = liked_history(part, int((lengths - self.starts).max(initial=0)))
        self.read = liked_history(part, read_length) if read_length else None
        self.trees, self.num_breaks = group_rows(self.users, self.is_cold, self.histories, self.starts, rows_per_tree)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, number: int) -> dict:
        if number >= len(self):
            raise IndexError(number)
        rows = self.trees[number]
        return {
            **self.write_tree(rows, self._draw_template(number)),
            "users": self.users[rows],
            "items": self.items[rows],
            "liked": self.shown[rows],
            "with_ids": ~self.is_cold[rows],
            "labels": self.labels[rows],
        } | ({} if self.read is None else {"read": self.read[rows]})

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Return the tokens of each tree, int64 [trees], in this epoch, or in the epoch where it is `longest`."""
        lengths = []
        for number, rows in enumerate(self.trees):
            templates = self._templates_of(rows[0]) if longest else [self._draw_template(number)]
            lengths.append(max(len(self.write_tree(rows, template)["input_ids"]) for template in templates))
        return np.array(lengths, dtype=np.int64)

    def _templates_of(self, row: int) -> Sequence[TreeTemplate]:
        return self.cold_templates if self.is_cold[row] else self.templates

    def _draw_template(self, number: int) -> TreeTemplate:
        """Return the template of a tree in this epoch."""
        templates = self._templates_of(self.trees[number][0])
        return random.Random(f"{self.seed} {self.epoch} {number}").choice(templates) if self.draw else templates[0]

    def _split(self, prompt: str) -> tuple[TreeTemplate, Answer]:
        """Return a prompt template in pieces, and its answers."""
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
        pieces.append(Piece(ids, None, ""))
        # A user's code is a text that all rows of the user share; soft tokens belong to a row.
        shared = {"user"} if self.codes else set()
        cut = next(place for place, piece in enumerate(pieces) if piece.field not in shared)
        cut += pieces[cut].field == "history"
        return TreeTemplate(pieces[:cut], pieces[cut:]), answer

    # ---- Histories that fit ----

    def _fitting_starts(self, starts: np.ndarray) -> np.ndarray:
        """Return `starts`, later ones where a prompt would exceed the limit with one of its templates.

        An upper bound of the tokens finds the rows that could; only their prompts are written.
        """
        items, offsets = self.histories
        sizes = {item: len(self._encode(self.his_sep + self._quote(item))) for item in np.unique(items).tolist()}
        tokens = np.cumsum([0, *(sizes[item] for item in items.tolist())])
        asked = {item: len(self._encode(" " + self._title(item))) for item in np.unique(self.items).tolist()}
        words = max(
            sum(len(piece.ids) for piece in [*template.trunk, *template.branch])
            for template in (*self.templates, *self.cold_templates)
        )
        bound = tokens[offsets[1:]] - tokens[offsets[:-1] + starts] + [asked[item] for item in self.items.tolist()]
        # Two codes or rates, NO_HISTORY, soft tokens of user, item and history, spaces that become tokens.
        bound = bound + words + 128 + self.soft_tokens * (2 + np.diff(offsets) - starts)
        starts = starts.copy()
        for row in np.flatnonzero(bound > self.limit).tolist():
            starts[row] = self._fitting_start(row, int(starts[row]))
        return starts

    def _fitting_start(self, row: int, start: int) -> int:
        tokens = 0
        for first in range(start, len(self.histories.shown(row, 0)) + 1):
            shown = self.histories.shown(row, first)
            tokens = max(
                len(self._fill(row, [*template.trunk, *template.branch], shown, 0)[0])
                for template in self._templates_of(row)
            )
            if tokens <= self.limit:
                return first
        user, item = int(self.users[row]), int(self.items[row])
        raise InputError(
            f"the question about user {user} and item {item} has {tokens} tokens without any history, the model reads "
            f"{self.limit}: shorten the title {self.titles[item][:40]!r} or the prompts"
        )

    # ---- Tokens ----

    def write_tree(self, rows: np.ndarray, template: TreeTemplate) -> dict:
        """Return the tokens of a tree of `rows`, the last of which has the longest history."""
        ids, ends = self._write_trunk(rows[-1], template)
        trunk, soft = len(ids), [0] * len(ids)
        positions, branch, visible, last = [*range(trunk)], [0] * trunk, [0] * trunk, []
        for number, row in enumerate(rows.tolist(), start=1):
            shown = self.histories.shown(row, self.starts[row])
            pieces, end = template.branch, ends[0]
            if template.shares_history and len(shown):
                end = ends[len(shown)]
            elif template.shares_history:
                pieces = [Piece([], "history", template.trunk[-1].gap), *pieces]
            new, new_soft = self._fill(row, pieces, shown, self.shown.shape[1] - len(shown))
            ids, soft = ids + new, soft + new_soft
            positions += range(end, end + len(new))
            branch += [number] * len(new)
            visible += [end] * len(new)
            last.append(len(ids) - 1)
        tokens = {"input_ids": ids, "position_ids": positions, "branch": branch, "visible": visible, "soft": soft}
        return tokens | {"trunk": trunk, "last": last}

    def _write_trunk(self, row: int, template: TreeTemplate) -> tuple[list[int], list[int]]:
        """Return the tokens of a trunk, and how many of them a row sees that has 0, 1, 2, ... of the liked items."""
        if not template.shares_history:
            ids, _ = self._fill(row, template.trunk, self.histories.items[:0], 0)
            return ids, [len(ids)]
        ids, _ = self._fill(row, template.trunk[:-1], self.histories.items[:0], 0)
        words, _, gap = template.trunk[-1]
        ids = ids + words
        ends = [len(ids)]
        shown = self.histories.shown(row, self.starts[row])
        for tokens in self._history_tokens(shown, gap) if len(shown) else ():  # a branch says that there is none
            ids = ids + tokens
            ends.append(len(ids))
        return ids, ends

    def _fill(self, row: int, pieces: list[Piece], shown: np.ndarray, place: int) -> tuple[list[int], list[int]]:
        """Return the tokens of some pieces of a row's prompt, and the numbers of their soft tokens.

        Args:
            shown: int64 [items], the liked items that the prompt shows.
            place: of the first of them in `liked`.
        """
        ids: list[int] = []
        soft: list[int] = []
        for words, field, gap in pieces:
            ids += words
            if field == "history":
                for tokens in self._history_tokens(shown, gap):
                    ids += tokens
            elif field == "title":
                ids += self._encode(gap + self._title(self.items[row]))
            elif field in ("user", "item") and self.codes:
                owner, number = (USER, self.users[row]) if field == "user" else (ITEM, self.items[row])
                ids += self._encode(gap + self.codes[owner][int(number)])
            elif field is not None and field in self.row_texts:
                ids += self._encode(gap + self.row_texts[field][row])
            elif field is not None:
                soft += [0] * (len(ids) - len(soft))
                liked = range(LIKED + place, LIKED + place + len(shown))
                owners = {"user": [USER], "item": [ITEM]}.get(field) or [*liked]
                soft += [1 + owner * self.soft_tokens + token for owner in owners for token in range(self.soft_tokens)]
                ids = ids + [self.tokenizer.pad_token_id] * (len(soft) - len(ids))
        return ids, soft + [0] * (len(ids) - len(soft))

    def _history_tokens(self, shown: np.ndarray, gap: str) -> list[list[int]]:
        """Return the tokens of each liked item with the separator before it; those of NO_HISTORY without any."""
        quoted = [self._quote(item) for item in shown.tolist()] or [NO_HISTORY]
        return [self._encode((self.his_sep if place else gap) + text) for place, text in enumerate(quoted)]

    def _quote(self, item: int) -> str:
        return f'"{self._title(item)}"'

    def _title(self, item: int) -> str:
        return self._sanitize(self.titles[int(item)])


def tree_sizes(sample: dict) -> tuple[int, int]:
    """Return how many tokens of a tree are in its trunk, and in all its branches."""
    return sample["trunk"], len(sample["input_ids"]) - sample["trunk"]


class YesNoCollator:
    """Collator of trees: a batch padded on the right, the arguments of `YesNoModel.forward`.

    int64 input_ids, position_ids, branch (-1 on padding), visible, soft, row (number in the batch of the row that a
    token of a branch belongs to) [trees, length]; trunk [trees]; tree (number of a row's tree), last, users, items
    [rows]; liked [rows, most shown items]; histories [rows, read_length]; bool with_ids [rows]; float32 labels [rows];
    int64 lengths [trees], tokens of each tree. Numbers that shapes depend on are Python's, so that no step waits for a
    GPU to state them: sizes (tokens of the longest trunk, most tokens of all branches of a tree), num_soft (largest of
    soft).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        sizes = torch.tensor([len(sample["last"]) for sample in samples])
        padding = {"input_ids": self.tokenizer.pad_token_id, "branch": -1, "position_ids": 0, "visible": 0, "soft": 0}
        batch: dict[str, Any] = {key: pad([sample[key] for sample in samples], padding[key]) for key in padding}
        batch |= {
            "row": ((sizes.cumsum(0) - sizes)[:, None] + batch["branch"] - 1).clamp(min=0),
            "trunk": torch.tensor([sample["trunk"] for sample in samples]),
            "tree": torch.arange(len(samples)).repeat_interleave(sizes),
            "last": torch.tensor([place for sample in samples for place in sample["last"]]),
            "lengths": torch.tensor([len(sample["input_ids"]) for sample in samples]),
            "sizes": tuple(max(sizes) for sizes in zip(*map(tree_sizes, samples), strict=True)),
            "num_soft": max(max(sample["soft"]) for sample in samples),
        }
        for name, key in (("histories", "read"), *((key, key) for key in ("users", "items", "liked", "with_ids"))):
            if key in samples[0]:
                batch[name] = torch.from_numpy(np.concatenate([sample[key] for sample in samples]))
        batch["labels"] = torch.from_numpy(np.concatenate([sample["labels"] for sample in samples])).float()
        return batch
