"""Recommender: one door from a next-item checkpoint to ranked items.

recommender = Recommender.from_pretrained("ckpt/ml-100k/lcrec", data_path="data")
recommender.recommend([["12", "55", "7"]], k=10, exclude_seen=True)
"""

from reclingua.utils.logging import silenced_transformers

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

import datasets
import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.collators import prompt_batch
from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.tasks import empty_samples, history_samples, seqrec_task
from reclingua.decoding.beam_search import ScoredItem, beam_search
from reclingua.decoding.item_scores import score_items
from reclingua.decoding.kv_cache import DecoderSelector
from reclingua.decoding.trie import Trie
from reclingua.inference.batching import map_batches, split_batches
from reclingua.inference.loading import (
    build_instructions,
    check_context_length,
    load_language_model,
    load_metadata,
    load_next_item_dataset,
    load_prompts,
)
from reclingua.models.vocabulary import index_token_ids
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata

NUM_BEAMS = 20  # LC-Rec's


class Recommender:
    """A next-item model with all it takes to ask it: dataset, semantic IDs, prompts, trie, token ids.

    Args:
        model: a causal language model that knows the semantic IDs of `dataset` as tokens.
        dataset: with semantic IDs, and with item texts where the prompts of `task` show titles.
        metadata: how prompts were made in training.
        task: seqrec; or itemsearch or fusionseqrec, if the model was trained on it (reclingua/datasets/tasks.py).

    Raises:
        InputError: a code of a semantic ID is not a token of this tokenizer; no prompt of the task asks for an item.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: InteractionDataset,
        metadata: CheckpointMetadata,
        task: str = "seqrec",
    ):
        self.model, self.tokenizer, self.dataset, self.metadata = model, tokenizer, dataset, metadata
        self.task = seqrec_task(metadata.targets or "last") if task == "seqrec" else task
        self.templates, self.prompt_ids = load_prompts(metadata, self.task)
        self.token_ids = index_token_ids(tokenizer, dataset.index)
        # Every path ends with the end token, as responses do, unless an item is asked for inside a history.
        self._end = None if self.task == "seqrec_history" else tokenizer.eos_token_id
        self.trie = Trie.build(self.token_ids, end=self._end)
        self.selector = DecoderSelector(model)
        self._instructions = build_instructions(
            empty_samples(), dataset, tokenizer, {self.task: self.templates}, self.token_ids, metadata
        )

    @classmethod
    @silenced_transformers()
    def from_pretrained(
        cls,
        folder: str | Path,
        data_path: str | Path | None = "data",
        *,
        dataset: str | None = None,
        index_file: str | None = None,
        task: str = "seqrec",
        base_model: str | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a checkpoint of `finetune.py --method lcrec` and the dataset it was tuned on, and check them.

        Args:
            folder: full weights or an adapter.
            data_path: folder that holds <dataset>/; None: the checkpoint alone, with its items and no histories.
            dataset: its name (default: that of training).
            index_file: suffix of the file of semantic IDs, or a path to one if it has a slash (default: the semantic
                IDs in the checkpoint).
            task: what is asked, see the class.
            base_model: base model of an adapter checkpoint, overrides the stored path.
            device: default: the GPU if there is one.

        Raises:
            InputError: a file is missing or broken; items or semantic IDs are not those of training; the model was
                not trained on `task`.
        """
        folder, metadata = Path(folder), load_metadata(folder)
        if metadata.method != "lcrec":
            raise InputError(f"{folder}: was trained by {metadata.method}, which recommends no items; use Scorer")
        data = load_next_item_dataset(folder, metadata, data_path, dataset, index_file, task)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, tokenizer = load_language_model(folder, metadata, device, base_model)
        return cls(model, tokenizer, data, metadata, task)

    def restrict(self, items: Collection[str]) -> None:
        """Recommend none but `items` from now on: as if the others were excluded for each history, at no cost.

        Raises:
            InputError: none of them has a semantic ID.
        """
        kept = {item: ids for item, ids in self.token_ids.items() if item in items}
        self.trie = Trie.build(kept, end=self._end)

    def recommend(
        self,
        histories: Sequence[Sequence[str]] | datasets.Dataset,
        k: int = 10,
        *,
        exclude_seen: bool = False,
        excluded: Sequence[Collection[str]] | None = None,
        num_beams: int | None = None,
        prompt_id: int | None = None,
        batch_size: int = 32,
        score_over: str = "vocabulary",
        show_progress: bool = False,
    ) -> list[list[ScoredItem]]:
        """Return for each history its best `k` items, best first; fewer only where fewer are left.

        Args:
            histories: item ids as strings, oldest first; or samples of a dataset part
                (`reclingua.datasets.tasks.held_out_samples`).
            exclude_seen: leave out the items of the history. Samples hold the end of a history only: give `excluded`.
            excluded: for each history further items to leave out.
            num_beams: width of the beam search, `k` at least (default: 20, or `k` if that is more).
            prompt_id: number of a prompt template that asks for an item, of `prompt_ids` (default: the first).
            batch_size: histories per batch; on OOM it is halved, the beam width never changes.
            score_over: see `beam_search`.

        Raises:
            InputError: an argument is out of range, an item is unknown, a history is empty, a prompt is too long, or
                memory does not suffice.
        """
        num_beams = max(k, NUM_BEAMS) if num_beams is None else num_beams
        if not 1 <= k <= num_beams:
            raise InputError(f"k {k}, num_beams {num_beams}: k should be from 1 to num_beams")
        if excluded is not None and len(excluded) != len(histories):
            raise InputError(f"{len(histories)} histories, {len(excluded)} lists of excluded items: give one of each")
        if isinstance(histories, datasets.Dataset):
            samples = histories
            if exclude_seen:
                raise InputError("exclude_seen: samples hold the end of a history only; give the items as excluded")
        else:
            samples = self.encode_histories(histories)
            if exclude_seen:
                further = excluded or [[]] * len(histories)
                excluded = [[*seen, *items] for seen, items in zip(histories, further, strict=True)]
        prompts = self.encode(samples, prompt_id)
        lists = self.search(prompts, num_beams, excluded, batch_size, score_over, show_progress)
        return [ranked[:k] for ranked in lists]

    def encode_histories(self, histories: Sequence[Sequence[str]]) -> datasets.Dataset:
        """Return samples of this task for histories of item ids, oldest first; InputError for what is no history."""
        for number, history in enumerate(histories):
            if isinstance(history, str):
                raise InputError(f"history {number}: should be a list of item ids, not the text {history[:50]!r}")
            if not history:
                raise InputError(f"history {number}: is empty; the model needs at least one item")
            unknown = next((item for item in history if item not in self.dataset.index), None)
            if unknown is not None:
                name, example = self.dataset.name, next(iter(self.dataset.index))
                raise InputError(
                    f"history {number}: item {unknown!r} is not in {name}, whose ids are texts like {example!r}; "
                    f"{name}.item2id maps those of the raw files to them"
                )
        return history_samples(self.task, histories, self.metadata.max_his_len)

    def encode(self, samples: datasets.Dataset, prompt_id: int | None = None) -> list[list[int]]:
        """Return the token ids of each sample's prompt; InputError if one is longer than the model reads."""
        prompt_id = self.prompt_ids[0] if prompt_id is None else prompt_id
        if prompt_id not in self.prompt_ids:
            raise InputError(f"prompt_id {prompt_id}: should be one of {', '.join(map(str, self.prompt_ids))}")
        template = self.templates[prompt_id]
        prompts = [self._instructions.encode_prompt(sample, template) for sample in samples]
        check_context_length(self.model, max(map(len, prompts), default=0) + self.trie.depth)
        return prompts

    def search(
        self,
        prompts: list[list[int]],
        num_beams: int,
        excluded: Sequence[Collection[str]] | None = None,
        batch_size: int = 32,
        score_over: str = "vocabulary",
        show_progress: bool = False,
    ) -> list[list[ScoredItem]]:
        """Return the best `num_beams` items after each prompt of `encode`; arguments as in `recommend`.

        Prompts of similar length share a batch, the longest first, so that too little memory shows at once. Every
        process of a process group gets all lists.
        """
        self.trie.to(self.model.device)

        def search_batch(rows: list[int]) -> list[list[ScoredItem]]:
            batch = prompt_batch(self.tokenizer, [prompts[row] for row in rows]).to(self.model.device)
            numbers = self.trie.item_numbers([excluded[row] for row in rows]) if excluded is not None else None
            return beam_search(
                self.model,
                **batch,
                trie=self.trie,
                num_beams=num_beams,
                excluded=numbers,
                score_over=score_over,
                selector=self.selector,
            )

        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        batches = split_batches(order, batch_size)
        advice = "take fewer beams (--num_beams)"
        ranked: dict[int, list[ScoredItem]] = {}
        for rows, lists in map_batches(self.model, search_batch, batches, "user", advice, show_progress):
            ranked.update(zip(rows, lists, strict=True))
        if distributed.is_initialized():
            return self._gather(ranked, num_beams, len(prompts))
        return [ranked[row] for row in range(len(prompts))]

    def score(
        self,
        histories: Sequence[Sequence[str]] | datasets.Dataset,
        items: Sequence[Sequence[str]],
        *,
        prompt_id: int | None = None,
        batch_size: int = 32,
        score_over: str = "vocabulary",
        show_progress: bool = False,
    ) -> list[np.ndarray]:
        """Return for each history the scores of the given items, float32 [items]: exact, whatever the beam width.

        An item that `recommend` returns has the same score there. All items of a history are computed in one pass over
        the cache of its prompt. Every process of a process group gets all scores.

        Args:
            histories, prompt_id, batch_size, score_over, show_progress: as in `recommend`.
            items: for each history the ids of the items to score.

        Raises:
            InputError: an item has no semantic ID; otherwise as `recommend`.
        """
        if len(items) != len(histories):
            raise InputError(f"{len(histories)} histories, {len(items)} lists of items: give one of each")
        for row, candidates in enumerate(items):
            if unknown := next((item for item in candidates if item not in self.dataset.index), None):
                raise InputError(f"row {row}: item {unknown!r} has no semantic ID in {self.dataset.name}")
        is_encoded = isinstance(histories, datasets.Dataset)
        prompts = self.encode(histories if is_encoded else self.encode_histories(histories), prompt_id)
        self.trie.to(self.model.device)
        numbers = self.trie.item_numbers(items)
        scores = torch.zeros(numbers.shape, device=self.model.device)

        def score_batch(rows: list[int]) -> torch.Tensor:
            batch = prompt_batch(self.tokenizer, [prompts[row] for row in rows]).to(self.model.device)
            width = max(len(items[row]) for row in rows)
            return score_items(
                self.model,
                **batch,
                trie=self.trie,
                items=numbers[rows, :width],
                score_over=score_over,
                selector=self.selector,
            )

        order = sorted((row for row in range(len(prompts)) if items[row]), key=lambda row: -len(prompts[row]))
        batches = split_batches(order, batch_size)
        advice = "score fewer items"
        for rows, batch_scores in map_batches(self.model, score_batch, batches, "user", advice, show_progress):
            scores[rows, : batch_scores.shape[1]] = batch_scores.masked_fill(batch_scores.isneginf(), 0)
        if distributed.is_initialized():
            distributed.all_reduce(scores)
        return [row[: len(candidates)] for row, candidates in zip(scores.cpu().numpy(), items, strict=True)]

    def _gather(self, ranked: dict[int, list[ScoredItem]], num_beams: int, rows: int) -> list[list[ScoredItem]]:
        """Return the lists of all processes, each row from the process that searched for it."""
        items = torch.full((rows, num_beams), -1)
        scores = torch.full((rows, num_beams), -torch.inf)
        searches = torch.zeros(rows, dtype=torch.int64)
        for row, scored in ranked.items():
            numbers = [self.trie.item_to_number[entry.item] for entry in scored]
            items[row, : len(scored)] = torch.tensor(numbers, dtype=torch.int64)
            scores[row, : len(scored)] = torch.tensor([entry.score for entry in scored])
            searches[row] += 1
        device = self.model.device
        items, scores, searches = items.to(device), scores.to(device), searches.to(device)
        for tensor, reduce in ((items, "MAX"), (scores, "MAX"), (searches, "SUM")):
            distributed.all_reduce(tensor, getattr(distributed.ReduceOp, reduce))
        if (searches != 1).any():
            raise RuntimeError(f"row {int((searches != 1).nonzero()[0])} was not searched exactly once")
        return [
            [ScoredItem(self.trie.items[number], score) for number, score in zip(*row, strict=True) if number >= 0]
            for row in zip(items.tolist(), scores.tolist(), strict=True)
        ]
