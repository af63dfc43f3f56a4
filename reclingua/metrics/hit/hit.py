"""hit@k metric (HR@k): share of samples whose target is among the first k predictions."""

import datasets
import evaluate

DESCRIPTION = "Share of samples whose one target is among the first k ranked predictions."


class Hit(evaluate.Metric):
    """`evaluate` module: compute(predictions=[[item, ...], ...], references=[item, ...], k=[5]) -> {"hit@5": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.List(datasets.Value("string")), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, predictions: list[list[str]], references: list[str], k: list[int]) -> dict[str, float]:
        return {
            f"hit@{cut}": sum(
                target in ranked[:cut] for ranked, target in zip(predictions, references, strict=True)
            ) / len(references)
            for cut in k
        }  # fmt: skip
