"""Schemas of requests and answers: they validate JSON and make the OpenAPI document.

An id is one of the dataset folder, a text or a whole number.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, WithJsonSchema

from reclingua.inference.request_files import MAX_ID, MAX_ITEMS

MAX_SCORED = 1000  # items of a request for scores


def to_whole(value: object) -> object:
    """Return 2 for 2.0, which JSON Schema calls an integer, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_id(value: object) -> object:
    """Return a whole number as text, and anything else as it is; ValueError for halves of characters."""
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise ValueError("should be valid Unicode")
    value = to_whole(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Id = Annotated[
    str,
    BeforeValidator(to_id),
    Field(min_length=1, max_length=MAX_ID),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID}, {"type": "integer"}]}),
]
Ids = Annotated[list[Id], Field(max_length=MAX_ITEMS)]
Source = Literal["model", "popularity"]


class Request(BaseModel):
    """Fields of all requests; a field with another name is an error."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="default: the first that fits")
    history: Ids = Field(description="item ids, the latest last; the model reads the last ones")


class RecommendRequest(Request):
    """Request for a list."""

    k: Annotated[StrictInt, BeforeValidator(to_whole)] = Field(
        10, ge=1, description="length of the list, at most `max_k` of the model (/v1/models)"
    )
    exclude: Ids = Field([], description="items to leave out")
    candidates: Ids | None = Field(None, description="recommend these items only")
    exclude_seen: StrictBool = Field(False, description="leave out the items of the history")
    fuse: StrictBool = Field(False, description="rank by the fusion that the checkpoint holds")


class ScoreRequest(Request):
    """Request for the scores of given items."""

    items: list[Id] = Field(min_length=1, max_length=MAX_SCORED, description="items to score")
    user: Id | None = Field(None, description="user id of the ratings, for models with user embeddings")


class ItemsQuery(BaseModel):
    """Query parameters of a search for items; a parameter with another name is an error."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field("", max_length=1000, description="words of a title")
    limit: int = Field(10, ge=1, le=100)
    model: str | None = Field(None, max_length=200, description="default: the first")


class Item(BaseModel):
    """An item of the catalogue."""

    item: str
    title: str


class RankedItem(Item):
    """An item of a list."""

    score: float = Field(description="log-probability, fused score, or number of interactions by popularity")


class ScoredItem(BaseModel):
    """An item with its score."""

    item: str
    score: float = Field(description="log-probability, logit of liking, or number of interactions by popularity")
    probability: float | None = Field(description="of liking; null for a next-item model")


class Answer(BaseModel):
    """Fields of all answers."""

    model: str = Field(description="name of the model")
    catalogue: str = Field(description="version of the items that the whole answer is about")


class ModelAnswer(Answer):
    """Fields of the answers that a model computes."""

    source: Source = Field(description="popularity: the history has no known item")
    ignored: dict[str, list[str]] = Field(description="field of the request -> its unknown ids")


class RecommendAnswer(ModelAnswer):
    """A list, best first; shorter than k only where fewer items are left."""

    items: list[RankedItem]


class ScoreAnswer(ModelAnswer):
    """The scores of the known items, in the order of the request."""

    scores: list[ScoredItem]


class ItemsAnswer(Answer):
    """Items whose titles contain all words of the query, titles that start with it first, popular ones first."""

    items: list[Item]


class ModelInfo(BaseModel):
    """A served model."""

    name: str
    kind: Literal["next-item", "rating"]
    dataset: str
    catalogue: str
    items: int = Field(description="number of items")
    max_k: int | None = Field(description="longest list; null for a model of ratings")
    max_his_len: int = Field(description="items of a history that the model reads, the last ones")
    fusions: list[bool] = Field(description="values of exclude_seen with which `fuse` can be asked for")


class ReloadAnswer(BaseModel):
    """Model -> version of its catalogue after a reload."""

    catalogues: dict[str, str]


class Status(BaseModel):
    """State of the server."""

    status: str


class Problem(BaseModel):
    """Reason why a request has no other answer."""

    detail: str
