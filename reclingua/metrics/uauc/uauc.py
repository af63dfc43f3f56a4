"""UAUC metric: mean of the users' AUCs, over users with both labels (CoLLM, section 4.1)."""

import datasets
import evaluate
import numpy as np

from reclingua.metrics.roc import uauc

DESCRIPTION = "Mean of the users' AUCs; users with one label only are left out and counted."


class Uauc(evaluate.Metric):
    """`evaluate` module: compute(prediction_scores=[float, ...], references=[0 or 1, ...], users=[id, ...]).

    It returns {"uauc": float, NaN if no user has both labels, "users_counted": int, "users_left_out": int}.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "prediction_scores": datasets.Value("float64"),
                "references": datasets.Value("float64"),
                "users": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, prediction_scores: list[float], references: list[float], users: list[int]) -> dict:
        return uauc(np.asarray(users), np.asarray(references), np.asarray(prediction_scores))
