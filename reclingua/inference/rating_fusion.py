"""Fusion of log-odds for ratings: a model, the like-rates and the collaborative model, one weight each.

fused = load_rating_fusion("ckpt/ml-1m/collm-mf", scorer)       # after test.py --fuse like-rates
fused.log_odds(scorer.dataset.parts["test"])
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from reclingua.baselines.rates import LikeRates
from reclingua.datasets.ratings import RatingsDataset, to_numpy
from reclingua.inference.collaborative import score_rows
from reclingua.inference.fusion import AGAIN, FUSION_FILE, read_fusions, write_fusions
from reclingua.inference.scorer import Scorer
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError

RATE_SOURCES = ("item like-rate", "user like-rate")


@dataclass(frozen=True)
class RatingFusion:
    """A logistic regression on the log-odds of several sources.

    Args:
        weights: source -> weight.
        intercept: added to the weighted sum.
        prompt_id, cold_text_only: how a Yes/No model was asked.
        counts_valid: whether like-rates count the valid ratings.
    """

    weights: dict[str, float]
    intercept: float
    prompt_id: int = 0
    cold_text_only: bool = False
    counts_valid: bool = False

    @classmethod
    def fit(cls, sources: Mapping[str, np.ndarray], labels: np.ndarray) -> "RatingFusion":
        """Fit the weights by maximum likelihood.

        Args:
            sources: name -> log-odds, float [rows].
            labels: [rows], 0 or 1.

        Raises:
            InputError: all labels are equal.
        """
        from sklearn.linear_model import LogisticRegression  # takes a second to import

        if len(np.unique(labels)) < 2:
            raise InputError("--fuse: the valid ratings that fit its weights are all liked or all disliked; take more")
        features = np.stack(list(sources.values()), axis=1)
        scale = features.std(0)
        scale[scale == 0] = 1
        model = LogisticRegression(C=100.0).fit(features / scale, labels)
        weights = model.coef_[0] / scale
        return cls(dict(zip(sources, weights.tolist(), strict=True)), float(model.intercept_[0]))

    def log_odds(self, sources: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the fused log-odds, float64 [rows]."""
        features = np.stack([sources[name] for name in self.weights], axis=1)
        return features @ np.array(list(self.weights.values())) + self.intercept


class FusedScorer:
    """A model of ratings and its fusion with like-rates.

    Args:
        scorer: the model.
        fusion: fitted to it.
    """

    def __init__(self, scorer: Scorer, fusion: RatingFusion):
        self.scorer, self.fusion = scorer, fusion
        self.rates, self.cf_model = LikeRates(scorer.dataset, fusion.counts_valid), read_collaborative(scorer)

    def log_odds(self, part: Dataset, batch_size: int = 32, bf16: bool = False) -> np.ndarray:
        """Return the fused log-odds of rows of ratings, float64 [rows]; the higher, the likelier they are liked.

        Args:
            bf16: the Yes/No model computes in bfloat16.
        """
        asked = self.fusion
        with torch.autocast(self.scorer.model.device.type, torch.bfloat16, enabled=bf16):
            scores = self.scorer.score(
                part, prompt_id=asked.prompt_id, cold_text_only=asked.cold_text_only, batch_size=batch_size
            )
        sources = {self.scorer.name: self.scorer.model.log_odds(scores.astype(np.float64))}
        return self.fusion.log_odds(sources | baseline_sources(self.rates, self.cf_model, part))


def read_collaborative(scorer: Scorer) -> CollaborativeModel | None:
    """Return the trained collaborative model that a Yes/No model reads, None if there is none.

    Soft and personalised prompts have embeddings of their own, which score nothing.
    """
    return scorer.model.cf_model if isinstance(scorer.model, YesNoModel) and scorer.metadata.cf_sha256 else None


def baseline_sources(rates: LikeRates, cf_model: CollaborativeModel | None, part: Dataset) -> dict[str, np.ndarray]:
    """Return the log-odds of the like-rates of item and user, and of the collaborative model if there is one."""
    sources = dict(zip(RATE_SOURCES, rates.log_odds(part).T, strict=True))
    return sources if cf_model is None else sources | {cf_model.config.model_type: score_rows(cf_model, part)}


def rating_rows(
    scorer: Scorer,
    part: Dataset,
    log_odds: np.ndarray,
    valid: tuple[Dataset, np.ndarray] | None,
    counts_valid: bool,
) -> tuple[dict[str, dict[str, np.ndarray]], RatingFusion | None]:
    """Return the scores of the like-rates, of the collaborative model that a Yes/No model reads, and of fusions.

    Args:
        log_odds: of the model for the rows of `part`.
        valid: ratings and the model's log-odds for them, which fit the weights of the fusions; None: no fusion.
        counts_valid: whether like-rates count the valid ratings. Weights are fitted without, as valid is predicted.

    Returns:
        "baselines" and "fused" -> name -> scores [rows]; and the fusion of the model.
    """
    cf_model = read_collaborative(scorer)
    rates, kind = LikeRates(scorer.dataset, counts_valid), "" if cf_model is None else cf_model.config.model_type
    sources = baseline_sources(rates, cf_model, part)
    baselines = {"like-rates": rates.scores(part)["like-rates"]}
    if kind:
        baselines[kind] = sources[kind]
    if valid is None:
        return {"baselines": baselines, "fused": {}}, None
    valid_part, valid_log_odds = valid
    of_valid = baseline_sources(LikeRates(scorer.dataset), cf_model, valid_part)
    labels = to_numpy(valid_part, "label")
    if kind:
        baselines[f"like-rates + {kind}"] = RatingFusion.fit(of_valid, labels).log_odds(sources)
    fusion = RatingFusion.fit({scorer.name: valid_log_odds, **of_valid}, labels)
    name = " + ".join([scorer.name, "like-rates", *([kind] if kind else [])])
    return {"baselines": baselines, "fused": {name: fusion.log_odds({scorer.name: log_odds, **sources})}}, fusion


def save_rating_fusion(folder: Path, dataset: RatingsDataset, fusion: RatingFusion) -> Path:
    """Write a fusion into the checkpoint folder of its model; return the path of the file."""
    return write_fusions(folder, dataset.sha256(), [asdict(fusion)])


def load_rating_fusion(folder: Path, scorer: Scorer) -> FusedScorer | None:
    """Return the fusion that the checkpoint of `scorer` holds, None without one.

    Raises:
        InputError: see `read_fusions`; or the fusion is of other sources than this model has.
    """
    entries = read_fusions(folder, scorer.dataset.sha256())
    if not entries:
        return None
    try:
        fusion = RatingFusion(**entries[-1])
        values = np.array([*fusion.weights.values(), fusion.intercept])
        cf_model = read_collaborative(scorer)
        kinds = [] if cf_model is None else [cf_model.config.model_type]
        if list(fusion.weights) != [scorer.name, *RATE_SOURCES, *kinds] or not np.isfinite(values).all():
            raise ValueError
        if not isinstance(fusion.prompt_id, int) or not 0 <= fusion.prompt_id < max(1, len(scorer.templates)):
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"{folder / FUSION_FILE}: holds no fusion of {scorer.name} with like-rates; {AGAIN}"
        ) from None
    return FusedScorer(scorer, fusion)
