"""Registry of the Yes/No methods: their models and prompts."""

from pathlib import Path

from reclingua.models.collm import CoLLM
from reclingua.models.cora import CoRA
from reclingua.models.yes_no import YesNoModel

# Method -> class of its model, key of its prompt templates in config/prompts/yes_no.yaml.
YES_NO_METHODS: dict[str, tuple[type[YesNoModel], str]] = {
    "tallrec": (YesNoModel, "text"),
    "collm": (CoLLM, "soft"),
    "binllm": (YesNoModel, "codes"),
    "cora": (CoRA, "text"),
    "softprompt": (CoLLM, "soft"),
    "personprompt": (CoLLM, "soft"),
}


def run_name(model: YesNoModel, method: str) -> str:
    """Return the name of a run's results: collm-mf, cora-sasrec, binllm, ..."""
    if method in ("collm", "cora") and model.cf_model is not None:
        return f"{method}-{model.cf_model.config.model_type}"
    return method


def load_yes_no_model(folder: Path, method: str, **options) -> YesNoModel:
    """Load a tuned model for evaluation; `options` are those of `YesNoModel.from_pretrained`."""
    return YES_NO_METHODS[method][0].from_pretrained(folder, **options)
