"""Samples of LC-Rec's tasks -> token ids and labels: the phrasing is drawn here, per sample and epoch."""

import random
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import IGNORE, encode_prompt, sanitizer
from reclingua.datasets.interactions import TEXT_KEYS, RecDataset
from reclingua.datasets.prompts import INTENTION_FIELDS, TARGET, PromptTemplate
from reclingua.datasets.tasks import stretch
from reclingua.utils.errors import InputError

COMPOSED = {"history", "titles", "preference"}  # fields that are made of several texts, or of one of them


class InstructionDataset(torch.utils.data.Dataset):
    """A `datasets.Dataset` of samples (reclingua/datasets/tasks.py) as token ids and labels.

    Which phrasing a sample gets, which of a user's preferences it tells, and where a long history is cut, depends on
    seed, epoch and sample alone: the same in every run, different in every epoch (`set_epoch`).

    Args:
        dataset: the indices and texts of the items that samples name.
        prompts: task -> its phrasings. A sample is given one whose fields it can fill.
        index_tokens: ids of the code tokens; in a history sample these are what is learned.
        max_text_len: words of a title, a description or what is told of a user, at most.
        add_prefix: number the items of a history: "1. <a_3>...".
        only_response: labels on the response alone, else on every token.
        templates_per_sample: task -> how many phrasings each sample gets in an epoch, LC-Rec's
            `train_prompt_sample_num`; 1 for a task that is not there.
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        dataset: RecDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, list[PromptTemplate]],
        index_tokens: Collection[int],
        max_his_len: int,
        his_sep: str,
        max_text_len: int = 64,
        add_prefix: bool = False,
        only_response: bool = True,
        templates_per_sample: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        self.samples, self.dataset, self.tokenizer, self.prompts = samples, dataset, tokenizer, prompts
        self.index_tokens = frozenset(index_tokens)
        self.max_his_len, self.his_sep, self.add_prefix = max_his_len, his_sep, add_prefix
        self.only_response, self.seed, self.epoch = only_response, seed, 0
        self._plain = lru_cache(2**18)(sanitizer(tokenizer, max_text_len))
        times = np.array([(templates_per_sample or {}).get(task, 1) for task in samples["task"]], dtype=np.int64)
        self._row = np.repeat(np.arange(len(samples)), times)  # of its sample, and which copy of it one is
        self._copy = np.arange(len(self._row)) - np.repeat(np.cumsum(times) - times, times)
        self._fitting: dict[tuple[str, frozenset[str]], list[int]] = {}
        self._template_lengths: dict[tuple[str, frozenset[str], int], dict[int, tuple[int, frozenset[str]]]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        sample = self.samples[int(self._row[i])]
        task = sample["task"]
        template = self.prompts[task][self._drawn(i, task, self._known(sample))]
        if task == "seqrec_history" and not sample["item"]:
            shift = self._shift(sample["user"], int(self._copy[i]))
            items = stretch(sample["history"], sample["part"], sample["parts"], self.max_his_len, shift)
            return self._whole([self._index(item) for item in items], template)
        if sample["preferences"]:
            draw = random.Random(f"{self.seed} {self.epoch} {i} preference")
            sample["preferences"] = [draw.choice(sample["preferences"])]
        return self.answered(sample, template)

    def prompt(self, sample: dict, template: PromptTemplate) -> str:
        """The text up to where the answer is to be given."""
        if lacking := template.fields - self._known(sample):
            whose = f"user {sample['user']!r}, of whom there is no {', '.join(sorted(lacking))}"
            raise InputError(f"the phrasing {template.prompt[:60]!r} cannot be put to {whose}")
        return self._asked(sample["task"], template, self._words(sample, template.fields), len(sample["history"]))

    def answered(self, sample: dict, template: PromptTemplate) -> dict[str, list[int]]:
        """Prompt and response, as at test."""
        return self._write(sample["task"], template, self._words(sample, template.fields), len(sample["history"]))

    # ---- What fills the fields of a phrasing ----

    def _known(self, sample: dict) -> frozenset[str]:
        """The fields that a sample can fill."""
        known = {"history"} if sample["history"] else set()
        if sample["history"] and all(self.dataset.items.get(item, {}).get("title") for item in sample["history"]):
            known |= {"titles"}
        if sample["item"]:
            about = self.dataset.items.get(sample["item"], {})
            known |= {"target"} | {field for field in TEXT_KEYS if str(about.get(field) or "").strip()}
        known |= {"preference"} if sample["preferences"] else set()
        return frozenset(known | set(INTENTION_FIELDS) if sample["intentions"] else known)

    def _choices(self, task: str, known: frozenset[str], whose: str = "a sample") -> list[int]:
        """The numbers of the phrasings that a sample can fill; InputError if there is none."""
        if (task, known) not in self._fitting:
            fitting = [number for number, template in enumerate(self.prompts[task]) if template.fields <= known]
            if not fitting:
                raise InputError(
                    f"no phrasing of {task} suits {whose}, which can fill just {', '.join(sorted(known))}: "
                    "add one to the prompt file (--prompt_file), or complete the item texts"
                )
            self._fitting[task, known] = fitting
        return self._fitting[task, known]

    def _drawn(self, i: int, task: str, known: frozenset[str]) -> int:
        """The number of the phrasing that sample i has in this epoch."""
        choices = self._choices(task, known)
        return choices[random.Random(f"{self.seed} {self.epoch} {i}").randrange(len(choices))]

    def _shift(self, user: str, copy: int) -> float:
        """Where the stretches of a user begin in this epoch, in this copy of them."""
        return random.Random(f"{self.seed} {self.epoch} {user}{f' {copy}' if copy else ''}").random()

    def _words(self, sample: dict, fields: Collection[str]) -> dict[str, str]:
        """What stands for each of the fields, and for the target if there is one."""
        words, about = {}, self.dataset.items.get(sample["item"], {})
        for field in fields:
            if field == "history":
                words[field] = self._joined([self._index(item) for item in sample["history"]])
            elif field == "titles":
                words[field] = self._quoted([self.dataset.title(item) for item in sample["history"]])
            elif field in TEXT_KEYS:
                words[field] = self._plain(str(about[field]))
            elif field == "preference":
                words[field] = self._plain(sample["preferences"][0])
            elif field in INTENTION_FIELDS:
                words[field] = self._plain(sample["intentions"][INTENTION_FIELDS.index(field)])
        return words | {"target": self._index(sample["item"])} if sample["item"] else words

    def _index(self, item: str) -> str:
        return "".join(self.dataset.index[item])

    def _joined(self, items: list[str]) -> str:
        return self.his_sep.join(self._number(at) + item for at, item in enumerate(items, start=1))

    def _quoted(self, titles: list[str]) -> str:
        numbered = (f'{self._number(at)}"{self._plain(title)}"' for at, title in enumerate(titles, start=1))
        return (self.his_sep or ", ").join(numbered)  # indices need nothing between them, titles do

    def _gap(self, length: int) -> str:
        """What stands between the last item of a history and the next one."""
        return (self.his_sep if length else "") + self._number(length + 1)

    def _number(self, at: int) -> str:
        return f"{at}. " if self.add_prefix else ""

    # ---- Words -> token ids and labels ----

    def _asked(self, task: str, template: PromptTemplate, words: dict[str, str], length: int) -> str:
        text = template.prompt.format(**words)
        return text + self._gap(length) if task == "seqrec_history" else text

    def _write(self, task: str, template: PromptTemplate, words: dict[str, str], length: int) -> dict[str, list[int]]:
        """Prompt and response; the response ends with the end token unless it is part of a history."""
        prompt = encode_prompt(self.tokenizer, self._asked(task, template, words, length))
        ids = self.tokenizer((template.response or TARGET).format(**words), add_special_tokens=False).input_ids
        if task != "seqrec_history":
            ids = [*ids, self.tokenizer.eos_token_id]
        labels = [IGNORE] * len(prompt) if self.only_response else prompt
        return {"input_ids": prompt + ids, "labels": [*labels, *ids]}

    def _whole(self, items: list[str], template: PromptTemplate) -> dict[str, list[int]]:
        """Items one after another, the codes of every item after the first as labels."""
        ids = encode_prompt(self.tokenizer, template.prompt.format(history=self._joined(items)))
        if not self.only_response:
            return {"input_ids": ids, "labels": list(ids)}
        given = encode_prompt(self.tokenizer, template.prompt.format(history=self._joined(items[:1])))
        labels = [token if token in self.index_tokens else IGNORE for token in ids]
        labels[: len(given)] = [IGNORE] * len(given)
        return {"input_ids": ids, "labels": labels}

    # ---- How long it gets ----

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Tokens of each sample in this epoch, int64 [samples]; or in whichever epoch it is `longest`.

        No sample is written out for it: index tokens stand for themselves whatever surrounds them, so that what a
        phrasing adds depends on the number of items alone. Other texts are counted by themselves; what their ends
        make with the words around them can be a few tokens less, or one or two more.
        """
        found = []
        for i, row in enumerate(self._row.tolist()):
            task, user, known, items, own, part, parts = self._sizes[row]
            if task == "seqrec_history" and "target" not in known:
                if longest:
                    items = sorted(items)[-self.max_his_len - 1 :]
                else:
                    items = stretch(items, part, parts, self.max_his_len, self._shift(user, int(self._copy[i])))
            own["history"] = sum(items)
            around = self._template_sizes(task, known, len(items))
            drawn = around.values() if longest else [around[self._drawn(i, task, known)]]
            found.append(max(tokens + sum(own[field] for field in fields) for tokens, fields in drawn))
        return np.array(found, dtype=np.int64)

    @cached_property
    def _sizes(self) -> list[tuple]:
        """Of each sample: task, user, the fields it can fill, tokens of the items of its history, tokens of what fills
        the other fields, part, parts."""

        @lru_cache(2**18)
        def count(text: str) -> int:
            return len(self.tokenizer(text, add_special_tokens=False).input_ids)

        sizes = []
        for sample in self.samples.to_list():
            task, known, history = sample["task"], self._known(sample), sample["history"]
            whose = f"item {sample['item']!r}" if not sample["user"] else f"user {sample['user']!r}"
            choices = self._choices(task, known, whose)
            asked = frozenset().union(*(self.prompts[task][number].fields for number in choices))
            own = {field: count(text) for field, text in self._words(sample, asked - COMPOSED).items()}
            if "titles" in asked:
                own["titles"] = sum(count(self._plain(self.dataset.title(item))) for item in history)
            if "preference" in asked:
                own["preference"] = max(count(self._plain(text)) for text in sample["preferences"])
            items = [count(self._index(item)) for item in history]
            sizes.append((task, sample["user"], known, items, own, sample["part"], sample["parts"]))
        return sizes

    def _template_sizes(self, task: str, known: frozenset[str], length: int) -> dict[int, tuple[int, frozenset[str]]]:
        """The phrasings that such a sample can have: the tokens besides what fills their fields, and these fields."""
        if (task, known, length) not in self._template_lengths:
            index, text = self._index(next(iter(self.dataset.index))), "x"
            words = dict.fromkeys(known, text) | {"target": index, "history": self._joined([index] * length)}
            words["titles"] = self._quoted([text] * length)
            tokens = {word: len(self.tokenizer(word, add_special_tokens=False).input_ids) for word in (index, text)}
            own = dict.fromkeys(known, tokens[text]) | {"target": tokens[index], "history": tokens[index] * length}
            own["titles"] = tokens[text] * length
            around = {}
            for number in self._choices(task, known):
                template = self.prompts[task][number]
                if task == "seqrec_history" and "target" not in known:
                    sample, fields = self._whole([index] * length, template), template.fields
                else:
                    sample = self._write(task, template, words, length)
                    fields = template.fields if template.response else template.fields | {"target"}
                around[number] = len(sample["input_ids"]) - sum(own[field] for field in fields), fields
            self._template_lengths[task, known, length] = around
        return self._template_lengths[task, known, length]
