"""UAUC: the mean of each user's own AUC, over the users that have both labels (CoLLM, section 4.1)."""

import datasets
import evaluate

from reclingua.metrics.roc import uauc

DESCRIPTION = "Mean AUC of a user; users with one label only are left out and counted."


class Uauc(evaluate.Metric):
    """compute(prediction_scores=[float, ...], references=[0 or 1, ...], users=[id, ...])

    Returns {"uauc": float, NaN if no user counts, "users_counted": int, "users_left_out": int}.
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
        return uauc(users, references, prediction_scores)
