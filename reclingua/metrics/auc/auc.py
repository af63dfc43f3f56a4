"""AUC metric: probability that a positive sample scores higher than a negative one, ties counting half."""

import datasets
import evaluate
import numpy as np

from reclingua.metrics.roc import auc

DESCRIPTION = "Area under the ROC curve of all samples; NaN where all have one label."


class Auc(evaluate.Metric):
    """`evaluate` module: compute(prediction_scores=[float, ...], references=[0 or 1, ...]) -> {"auc": float}."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"prediction_scores": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, prediction_scores: list[float], references: list[float]) -> dict[str, float]:
        return {"auc": auc(np.asarray(references), np.asarray(prediction_scores))}
