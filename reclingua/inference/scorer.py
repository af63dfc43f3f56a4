"""Scorer: one door from a Yes/No or collaborative checkpoint to scores of users and items.

scorer = Scorer.from_pretrained("ckpt/ml-1m/collm-mf", data_path="data")
scorer.score([["12", "55", "7"]], items=["9"], users=["3"])
"""

from reclingua.utils.logging import silenced_transformers

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import datasets
import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedTokenizerBase

from reclingua.datasets.collators import move_batch
from reclingua.datasets.ratings import RatingsDataset, make_ratings, open_ratings
from reclingua.datasets.yes_no import YesNoCollator, YesNoDataset
from reclingua.inference import collaborative
from reclingua.inference.batching import map_batches
from reclingua.inference.loading import build_yes_no_dataset, load_metadata, load_yes_no, yes_no_templates
from reclingua.models.collaborative import COLLABORATIVE_MODELS, load_collaborative
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.language import load_tokenizer
from reclingua.models.registry import YES_NO_METHODS, run_name
from reclingua.models.yes_no import YesNoConfig, YesNoModel, open_language
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata


class Scorer:
    """A model that scores whether a user will like an item, with all it takes to ask it.

    Args:
        model: a Yes/No model, or a collaborative model.
        dataset: the ratings and item texts that it was trained on.
        metadata: how prompts were made in training.
        tokenizer: of a Yes/No model.

    Attributes:
        num_truncated: prompts of the last `score` that were too long for the model, and lost their oldest titles.
    """

    def __init__(
        self,
        model: YesNoModel | CollaborativeModel,
        dataset: RatingsDataset,
        metadata: CheckpointMetadata,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.dataset, self.metadata, self.tokenizer = model, dataset, metadata, tokenizer
        self.name, self.templates, self.num_truncated = metadata.method, [], 0
        if isinstance(model, YesNoModel):
            self.name, self.templates = run_name(model, metadata.method), yes_no_templates(metadata)

    @classmethod
    @silenced_transformers()
    def from_pretrained(
        cls,
        folder: str | Path,
        data_path: str | Path = "data",
        *,
        dataset: str | None = None,
        base_model: str | None = None,
        cf_model: str | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a checkpoint of `finetune.py` (a Yes/No method) or of `pretrain.py`, and its ratings, and check them.

        Args:
            data_path: folder that holds <dataset>/.
            dataset: its name (default: that of training).
            base_model, cf_model: base model and collaborative model of the checkpoint, override the stored paths.
            device: default: the GPU if there is one.

        Raises:
            InputError: a file is missing or broken; the ratings are not those of training.
        """
        folder, metadata = Path(folder), load_metadata(folder)
        model: YesNoModel | CollaborativeModel
        tokenizer = None
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if metadata.method in YES_NO_METHODS:
            moved = {"base_model": base_model, "cf_model": cf_model}
            model, data = load_yes_no(folder, metadata, data_path, dataset, device, **moved)
            tokenizer = load_tokenizer(folder)
        elif metadata.tasks == ["next_item"]:
            raise InputError(
                f"{folder}: ranks next items; give it as --cf_model, with --baselines_only or a checkpoint"
            )
        elif metadata.method in COLLABORATIVE_MODELS:
            model = load_collaborative(folder)
            data = open_ratings(data_path, dataset or metadata.dataset)
            collaborative.check_same_dataset(model, data)
        else:
            raise InputError(f"{folder}: was trained by {metadata.method}, which scores no ratings; use Recommender")
        model.to(device)  # type: ignore[arg-type]
        return cls(model, data, metadata, tokenizer)

    def untuned(self) -> "Scorer":
        """Return a scorer of the base model of a Yes/No model before any tuning, asked by titles alone.

        Raises:
            InputError: it is a collaborative model, or the base model cannot be loaded.
        """
        if not isinstance(self.model, YesNoModel):
            raise InputError(f"{self.name} has no base model: it is a collaborative model")
        tuned = self.model.config
        names = ("base_model", "base_dtype", "load_in_4bit", "answer")
        config = YesNoConfig(**{name: getattr(tuned, name) for name in names}, trained=[], saved=[])
        model = YesNoModel(config, open_language(config, self.model.device)).eval()
        if not config.load_in_4bit:
            model.to(self.model.device)  # type: ignore[arg-type]
        metadata = replace(self.metadata, method="tallrec", prompts={"text": self.metadata.prompts["text"]})
        return Scorer(model, self.dataset, metadata, self.tokenizer)

    def score(
        self,
        histories: Sequence[Sequence[str]] | datasets.Dataset,
        items: Sequence[str] | None = None,
        users: Sequence[str | None] | None = None,
        *,
        prompt_id: int = 0,
        cold_text_only: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Return float32 [rows], the logits that users like items; the higher, the likelier.

        Args:
            histories: for each row the ids of liked items, oldest first; or rows of a dataset part
                (`scorer.dataset.parts["test"]`), which have items and users themselves.
            items: for each row the item in question.
            users: for each row the user's id; None or "0" for a user who is not in the data, whom a model with user
                embeddings knows nothing about.
            prompt_id: number of the prompt template.
            cold_text_only: ask by titles alone where training knew nothing of the user or of the item.

        Raises:
            InputError: an item or user is unknown, a prompt is too long, or memory does not suffice.
        """
        part = histories if isinstance(histories, datasets.Dataset) else None
        if part is None:
            part = make_ratings(self.dataset, histories, items or [], users)
        if isinstance(self.model, YesNoModel):
            return self.score_samples(self.encode(part, prompt_id, cold_text_only), batch_size, show_progress)
        return collaborative.score(self.model, collaborative.model_inputs(part, self.model))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities of liking that the logits of `score` stand for, float64 [rows]."""
        return 1 / (1 + np.exp(-self.model.log_odds(scores.astype(np.float64))))

    def encode(self, part: datasets.Dataset, prompt_id: int | None = 0, cold_text_only: bool = False) -> YesNoDataset:
        """Return the prompts of rows of ratings, for `score_samples`; arguments as in `score`."""
        if not isinstance(self.model, YesNoModel) or self.tokenizer is None:
            raise InputError(f"{self.name} reads no prompts: it is a collaborative model")
        if prompt_id is not None and not 0 <= prompt_id < len(self.templates):
            raise InputError(f"prompt_id {prompt_id}: should be from 0 to {len(self.templates) - 1}")
        return build_yes_no_dataset(
            part, self.dataset, self.tokenizer, self.model, self.metadata, prompt_id, cold_text_only
        )

    def score_samples(self, samples: YesNoDataset, batch_size: int, show_progress: bool = False) -> np.ndarray:
        """Return logits of Yes, float32 [rows], in the order of the rows.

        Every process of a process group gets all logits.

        Args:
            batch_size: largest number of rows of a batch, unless a tree has more.

        Raises:
            InputError: memory does not suffice for one tree; a logit is not a finite number.
        """
        model = self.model
        if not isinstance(model, YesNoModel):
            raise InputError(f"{self.name} reads no prompts: it is a collaborative model")
        collate = YesNoCollator(samples.tokenizer)
        scores = torch.zeros(len(samples.users), device=model.device)

        @torch.no_grad()
        def score_batch(trees: list[int]) -> torch.Tensor:
            batch = collate([samples[tree] for tree in trees])
            del batch["labels"], batch["lengths"]
            return model(**move_batch(batch, model.device)).logits

        self.num_truncated = samples.num_truncated
        advice = "take a smaller model, shorter histories, or fewer --rows_per_tree"
        for trees, logits in map_batches(
            model, score_batch, tree_batches(samples, batch_size), "tree of rows", advice, show_progress
        ):
            scores[np.concatenate([samples.trees[tree] for tree in trees])] = logits
        if distributed.is_initialized():
            distributed.all_reduce(scores)
        if not scores.isfinite().all():
            raise InputError(
                "the model's scores are not finite: lower --learning_rate, or compute in bfloat16 (--bf16) instead of "
                "float16"
            )
        return scores.cpu().numpy()


def tree_batches(samples: YesNoDataset, batch_size: int) -> list[list[int]]:
    """Return the trees of each batch, neighbours in length, the longest first; at most `batch_size` rows or one tree.

    Raises:
        InputError: the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: should be 1 at least")
    batches: list[list[int]] = []
    rows = batch_size
    for tree in np.argsort(-samples.lengths(), kind="stable").tolist():
        size = len(samples.trees[tree])
        if rows + size > batch_size:
            batches.append([])
            rows = 0
        batches[-1].append(tree)
        rows += size
    return batches
