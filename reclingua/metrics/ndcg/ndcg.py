"""ndcg@k metric with one relevant item: 1 / log2(rank + 2) of the target's 0-based rank, 0 beyond the first k."""

import math

import datasets
import evaluate

DESCRIPTION = "Normalised discounted cumulative gain at k where each sample has one relevant item."


class Ndcg(evaluate.Metric):
    """`evaluate` module: compute(predictions=[[item, ...], ...], references=[item, ...], k=[5]) -> {"ndcg@5": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.List(datasets.Value("string")), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, predictions: list[list[str]], references: list[str], k: list[int]) -> dict[str, float]:
        ranks = [
            ranked.index(target) if target in ranked else math.inf
            for ranked, target in zip(predictions, references, strict=True)
        ]
        return {f"ndcg@{cut}": sum(1 / math.log2(rank + 2) for rank in ranks if rank < cut) / len(ranks) for cut in k}
