"""RecLingua: tune an LLM to recommend, and ask it. `from reclingua import Recommender, Scorer`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reclingua.inference.recommender import Recommender
    from reclingua.inference.scorer import Scorer

__all__ = ["Recommender", "Scorer"]
_HOME = {"Recommender": "reclingua.inference.recommender", "Scorer": "reclingua.inference.scorer"}


def __getattr__(name: str) -> object:
    """Import a public class when it is asked for: torch and transformers take seconds, and few modules need them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
