"""Instruction dataset: samples of LC-Rec's tasks as token ids and labels, with a prompt template drawn per epoch."""

import random
from collections.abc import Collection, Mapping
from functools import cache, cached_property, lru_cache

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import IGNORE, encode_prompt, sanitizer
from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.item_texts import TEXT_KEYS
from reclingua.datasets.prompts import INTENTION_FIELDS, TARGET, PromptTemplate
from reclingua.datasets.tasks import history_segment
from reclingua.utils.errors import InputError

COMPOSED = {"history", "titles", "preference"}  # fields made of several texts, or of one drawn from several


class InstructionDataset(torch.utils.data.Dataset):
    """Torch dataset of samples (reclingua/datasets/tasks.py) with input_ids and labels, lists of int.

    The prompt template of a sample, the preference in it and the segment of a long history are functions of seed,
    epoch and sample: the same in every run, different in every epoch (`set_epoch`).

    Args:
        dataset: semantic IDs and texts of the items in `samples`.
        prompts: task -> its prompt templates. A sample gets one of those whose fields it can fill.
        token_ids: item -> semantic ID as token ids; these are the labels of a history sample.
        max_his_len: largest number of targets of a history sample.
        his_sep: separator between history items.
        max_text_len: largest number of words of a title, a description or a user text.
        add_prefix: number the items of a history: "1. <a_3>...".
        only_response: labels on the response only, else on every token.
        templates_per_sample: task -> number of prompt templates that each sample gets in an epoch, LC-Rec's
            `train_prompt_sample_num` (default: 1).
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        dataset: InteractionDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, list[PromptTemplate]],
        token_ids: Mapping[str, list[int]],
        max_his_len: int,
        his_sep: str,
        max_text_len: int = 64,
        add_prefix: bool = False,
        only_response: bool = True,
        templates_per_sample: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        self.samples, self.dataset, self.tokenizer, self.prompts = samples, dataset, tokenizer, prompts
        self.token_ids = token_ids
        self.index_tokens = frozenset(token for ids in token_ids.values() for token in ids)
        self.max_his_len, self.his_sep, self.add_prefix = max_his_len, his_sep, add_prefix
        self.only_response, self.seed, self.epoch = only_response, seed, 0
        self._sanitize = lru_cache(2**18)(sanitizer(tokenizer, max_text_len))
        self._encode_part = lru_cache(2**12)(self._encode_next_to_codes)
        copies = np.array([(templates_per_sample or {}).get(task, 1) for task in samples["task"]], dtype=np.int64)
        self._row = np.repeat(np.arange(len(samples)), copies)  # number of the sample, and of its copy
        self._copy = np.arange(len(self._row)) - np.repeat(np.cumsum(copies) - copies, copies)
        self._titled = {item for item, about in dataset.items.items() if about.get("title")}
        self._fitting: dict[tuple[str, frozenset[str]], list[int]] = {}
        self._template_lengths: dict[tuple[str, frozenset[str], int], dict[int, tuple[int, frozenset[str]]]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        sample = self.samples[int(self._row[i])]
        task = sample["task"]
        template = self.prompts[task][self._draw_template(i, task, self._known_fields(sample))]
        if task == "seqrec_history" and not sample["item"]:
            shift = self._draw_shift(sample["user"], int(self._copy[i]))
            items = history_segment(sample["history"], sample["part"], sample["parts"], self.max_his_len, shift)
            return self._encode_history(items, template)
        if sample["preferences"]:
            generator = random.Random(f"{self.seed} {self.epoch} {i} preference")
            sample["preferences"] = [generator.choice(sample["preferences"])]
        return self.encode(sample, template)

    def render_prompt(self, sample: dict, template: PromptTemplate) -> str:
        """Return the text of the prompt, up to the response; InputError if the sample lacks a field."""
        if missing := template.fields - self._known_fields(sample):
            raise InputError(
                f"user {sample['user']!r} has no {', '.join(sorted(missing))}, which the prompt template "
                f"{template.prompt[:60]!r} needs; choose another one"
            )
        return self._render(
            sample["task"], template, self._field_texts(sample, template.fields), len(sample["history"])
        )

    def encode_prompt(self, sample: dict, template: PromptTemplate) -> list[int]:
        """Return the token ids of `render_prompt`, and errors as there."""
        history = sample["history"]
        if template.around_history is None or not history:
            return encode_prompt(self.tokenizer, self.render_prompt(sample, template))
        ending = self._separator(len(history)) if sample["task"] == "seqrec_history" else ""
        return self._encode_items(history, template, ending)

    def encode(self, sample: dict, template: PromptTemplate) -> dict[str, list[int]]:
        """Return input_ids and labels of prompt and response."""
        prompt = self.encode_prompt(sample, template)
        if template.has_target_response:
            return self._with_response(prompt, self.token_ids[sample["item"]], sample["task"])
        texts = self._field_texts(sample, template.fields)
        return self._with_response(prompt, self._encode_response(template, texts), sample["task"])

    # ---- Fields of a prompt template ----

    def _known_fields(self, sample: dict) -> frozenset[str]:
        """Return the fields that a sample can fill."""
        known = {"history"} if sample["history"] else set()
        if sample["history"] and self._titled.issuperset(sample["history"]):
            known |= {"titles"}
        if sample["item"]:
            about = self.dataset.items.get(sample["item"], {})
            known |= {"target"} | {field for field in TEXT_KEYS if str(about.get(field) or "").strip()}
        known |= {"preference"} if sample["preferences"] else set()
        return frozenset(known | set(INTENTION_FIELDS) if sample["intentions"] else known)

    def _fitting_templates(self, task: str, known: frozenset[str], owner: str = "a sample") -> list[int]:
        """Return the numbers of the prompt templates that a sample can fill; InputError if there is none."""
        if (task, known) not in self._fitting:
            fitting = [number for number, template in enumerate(self.prompts[task]) if template.fields <= known]
            if not fitting:
                raise InputError(
                    f"no prompt template of {task} fits {owner}, which can only fill {', '.join(sorted(known))}: "
                    "add one to the prompt file (--prompt_file), or complete the item texts"
                )
            self._fitting[task, known] = fitting
        return self._fitting[task, known]

    def _draw_template(self, i: int, task: str, known: frozenset[str]) -> int:
        """Return the number of the prompt template of sample i in this epoch."""
        choices = self._fitting_templates(task, known)
        return choices[random.Random(f"{self.seed} {self.epoch} {i}").randrange(len(choices))]

    def _draw_shift(self, user: str, copy: int) -> float:
        """Return the shift of a user's history segments in this epoch and copy, see `history_segment`."""
        return random.Random(f"{self.seed} {self.epoch} {user}{f' {copy}' if copy else ''}").random()

    def _field_texts(self, sample: dict, fields: Collection[str]) -> dict[str, str]:
        """Return the text of each of the fields, and of the target if the sample has one."""
        texts, about = {}, self.dataset.items.get(sample["item"], {})
        for field in fields:
            if field == "history":
                texts[field] = self._join_items([self._index(item) for item in sample["history"]])
            elif field == "titles":
                texts[field] = self._join_titles([self.dataset.title(item) for item in sample["history"]])
            elif field in TEXT_KEYS:
                texts[field] = self._sanitize(str(about[field]))
            elif field == "preference":
                texts[field] = self._sanitize(sample["preferences"][0])
            elif field in INTENTION_FIELDS:
                texts[field] = self._sanitize(sample["intentions"][INTENTION_FIELDS.index(field)])
        return texts | {"target": self._index(sample["item"])} if sample["item"] else texts

    def _index(self, item: str) -> str:
        return "".join(self.dataset.index[item])

    def _join_items(self, items: list[str]) -> str:
        return self.his_sep.join(self._number(position) + item for position, item in enumerate(items, start=1))

    def _join_titles(self, titles: list[str]) -> str:
        numbered = (f'{self._number(place)}"{self._sanitize(title)}"' for place, title in enumerate(titles, start=1))
        return (self.his_sep or ", ").join(numbered)  # semantic IDs need no separator, titles do

    def _separator(self, length: int) -> str:
        """Return the text between the last item of a history and the next one."""
        return (self.his_sep if length else "") + self._number(length + 1)

    def _number(self, position: int) -> str:
        return f"{position}. " if self.add_prefix else ""

    # ---- Token ids and labels ----

    def _render(self, task: str, template: PromptTemplate, texts: dict[str, str], length: int) -> str:
        text = template.prompt.format(**texts)
        return text + self._separator(length) if task == "seqrec_history" else text

    def _encode_texts(
        self, task: str, template: PromptTemplate, texts: dict[str, str], length: int
    ) -> dict[str, list[int]]:
        prompt = encode_prompt(self.tokenizer, self._render(task, template, texts, length))
        return self._with_response(prompt, self._encode_response(template, texts), task)

    def _encode_response(self, template: PromptTemplate, texts: dict[str, str]) -> list[int]:
        return self.tokenizer((template.response or TARGET).format(**texts), add_special_tokens=False).input_ids

    def _with_response(self, prompt: list[int], ids: list[int], task: str) -> dict[str, list[int]]:
        """Return prompt and response; the response ends with the end token unless it is part of a history."""
        if task != "seqrec_history":
            ids = [*ids, self.tokenizer.eos_token_id]
        labels = [IGNORE] * len(prompt) if self.only_response else prompt
        return {"input_ids": prompt + ids, "labels": [*labels, *ids]}

    def _encode_history(self, items: list[str], template: PromptTemplate) -> dict[str, list[int]]:
        """Return a prompt that ends with the items; the codes of every item after the first are labels."""
        ids = self._encode_items(items, template)
        if not self.only_response:
            return {"input_ids": ids, "labels": list(ids)}
        labels = [token if token in self.index_tokens else IGNORE for token in ids]
        context = len(self._encode_items(items[:1], template))
        labels[:context] = [IGNORE] * context
        return {"input_ids": ids, "labels": labels}

    def _encode_items(self, items: list[str], template: PromptTemplate, ending: str = "") -> list[int]:
        """Return what `encode_prompt` returns for the prompt of these items, from parts that are encoded once.

        A code is one token and never merges with the text around it:   text | code code | text | code code | text
        """
        assert template.around_history is not None
        before, after = template.around_history
        ids = list(self._encode_part(before + self._number(1), "start"))
        for position, item in enumerate(items):
            ids += self._encode_part(self._separator(position), "middle") if position else ()
            ids += self.token_ids[item]
        return ids + self._encode_part(after + ending, "end")

    def _encode_next_to_codes(self, text: str, place: str) -> list[int]:
        """Return the tokens of a text between two codes, or at the "start" or the "end" of a prompt."""
        item, (code, *_) = next(iter(self.dataset.index.items()))
        if place == "start":
            return encode_prompt(self.tokenizer, text + code)[:-1]
        ids = encode_prompt(self.tokenizer, code + text + (code if place == "middle" else ""))
        first = ids.index(self.token_ids[item][0])  # after a BOS
        return ids[first + 1 : -1 if place == "middle" else None]

    # ---- Lengths ----

    def lengths(self, longest: bool = False) -> np.ndarray:
        """Return the tokens of each sample, int64 [samples], in this epoch, or in the epoch where it is `longest`.

        No sample is encoded for it. Code tokens never merge with the text around them, so the tokens that a prompt
        template adds depend on the number of items only. Other texts are counted on their own; merges at their ends
        make this an estimate: a few tokens fewer in the sample, or one or two more.
        """
        lengths = []
        for i, row in enumerate(self._row.tolist()):
            task, user, known, items, own, part, parts = self._sizes[row]
            if task == "seqrec_history" and "target" not in known:
                if longest:
                    items = sorted(items)[-self.max_his_len - 1 :]
                else:
                    shift = self._draw_shift(user, int(self._copy[i]))
                    items = history_segment(items, part, parts, self.max_his_len, shift)
            own["history"] = sum(items)
            sizes = self._template_sizes(task, known, len(items))
            candidates = sizes.values() if longest else [sizes[self._draw_template(i, task, known)]]
            lengths.append(max(tokens + sum(own[field] for field in fields) for tokens, fields in candidates))
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def _sizes(self) -> list[tuple]:
        """Of each sample: task, user, the fields it can fill, tokens of each item of its history, tokens of the texts
        of its other fields, part, parts."""

        @lru_cache(2**18)
        def count(text: str) -> int:
            return len(self.tokenizer(text, add_special_tokens=False).input_ids)

        @cache
        def count_codes(item: str) -> int:
            return count(self._index(item))

        sizes = []
        for sample in self.samples.to_list():
            task, known, history = sample["task"], self._known_fields(sample), sample["history"]
            owner = f"item {sample['item']!r}" if not sample["user"] else f"user {sample['user']!r}"
            fitting = self._fitting_templates(task, known, owner)
            needed = {field for number in fitting for field in self.prompts[task][number].fields}
            own = {field: count(text) for field, text in self._field_texts(sample, needed - COMPOSED).items()}
            if "titles" in needed:
                own["titles"] = sum(count(self._sanitize(self.dataset.title(item))) for item in history)
            if "preference" in needed:
                own["preference"] = max(count(self._sanitize(text)) for text in sample["preferences"])
            items = [count_codes(item) for item in history]
            sizes.append((task, sample["user"], known, items, own, sample["part"], sample["parts"]))
        return sizes

    def _template_sizes(self, task: str, known: frozenset[str], length: int) -> dict[int, tuple[int, frozenset[str]]]:
        """Return prompt template number -> (tokens without the texts of its fields, these fields)."""
        if (task, known, length) not in self._template_lengths:
            item = next(iter(self.dataset.index))
            index, text = self._index(item), "x"
            texts = dict.fromkeys(known, text) | {"target": index, "history": self._join_items([index] * length)}
            texts["titles"] = self._join_titles([text] * length)
            tokens = {word: len(self.tokenizer(word, add_special_tokens=False).input_ids) for word in (index, text)}
            own = dict.fromkeys(known, tokens[text]) | {"target": tokens[index], "history": tokens[index] * length}
            own["titles"] = tokens[text] * length
            sizes = {}
            for number in self._fitting_templates(task, known):
                template = self.prompts[task][number]
                if task == "seqrec_history" and "target" not in known:
                    sample, fields = self._encode_history([item] * length, template), template.fields
                else:
                    sample = self._encode_texts(task, template, texts, length)
                    fields = template.fields if template.response else template.fields | {"target"}
                sizes[number] = len(sample["input_ids"]) - sum(own[field] for field in fields), fields
            self._template_lengths[task, known, length] = sizes
        return self._template_lengths[task, known, length]
