"""Yes/No methods by name: their models and prompts."""

from pathlib import Path

from reclingua.models.collm import CoLLM
from reclingua.models.cora import CoRA
from reclingua.models.yes_no import YesNoModel

# Method -> its model, and the phrasings it asks with (config/prompts/yes_no.yaml).
YES_NO_METHODS: dict[str, tuple[type[YesNoModel], str]] = {
    "tallrec": (YesNoModel, "text"),
    "collm": (CoLLM, "soft"),
    "binllm": (YesNoModel, "codes"),
    "cora": (CoRA, "text"),
    "softprompt": (CoLLM, "soft"),
    "personprompt": (CoLLM, "soft"),
}


def run_name(model: YesNoModel, method: str) -> str:
    """What its results are called: collm-mf, cora-sasrec, binllm, ..."""
    return f"{method}-{model.cf_model.config.model_type}" if method in ("collm", "cora") else method


def load_yes_no_model(folder: Path, method: str, **where) -> YesNoModel:
    """A tuned model, for evaluation; see `YesNoModel.from_pretrained`."""
    return YES_NO_METHODS[method][0].from_pretrained(folder, **where)
