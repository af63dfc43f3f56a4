"""Service behind the routes: checks requests against the served models, and has them computed before a deadline."""

import asyncio
from collections.abc import Container, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError

from reclingua.serving import schemas
from reclingua.serving.access import Keys
from reclingua.serving.batching import BatchQueue
from reclingua.serving.models import ListRequest, NextItemModel, RatingModel, ScoreRequest, ServedModel
from reclingua.serving.registry import ModelRegistry

Model = TypeVar("Model", NextItemModel, ServedModel)
ANY_MODEL: tuple[type[ServedModel], ...] = (NextItemModel, RatingModel)


class Service:
    """Answers to valid requests, by the served models.

    Args:
        timeout: seconds from a request to its deadline.
    """

    def __init__(self, registry: ModelRegistry, queue: BatchQueue, keys: Keys, timeout: float):
        self.registry, self.queue, self.keys, self.timeout = registry, queue, keys, timeout
        self.is_draining = False

    async def recommend(self, body: schemas.RecommendRequest, request: Request) -> schemas.RecommendAnswer:
        """Return the list that `body` asks for; error 422 if its model cannot make it, otherwise as `_compute`."""
        model = self._find_model(body.model, (NextItemModel,), "body")
        longest = model.max_k(body.fuse)
        k = body.k if "k" in body.model_fields_set else min(body.k, longest)
        if k > longest:
            raise invalid(("body", "k"), f"should be {longest} at most")
        if body.fuse and body.exclude_seen not in model.fused:
            seen = "with" if body.exclude_seen else "without"
            raise invalid(("body", "fuse"), f"{model.name} holds no fusion {seen} exclude_seen")
        titles = model.catalogue.titles
        fields = {"history": body.history, "exclude": body.exclude, "candidates": body.candidates or []}
        known, ignored = split_known(fields, titles)
        excluded = set(known["exclude"])
        if body.candidates is not None:
            excluded |= titles.keys() - known["candidates"]
        if known["history"]:
            compute = model.recommend_fused if body.fuse else model.recommend
            wanted = ListRequest(known["history"], k, excluded, body.exclude_seen)
            ranked = await self._compute(request, self.queue.submit(compute, wanted))
        else:
            ranked = [entry for entry in model.popular if entry.item not in excluded][:k]
        items = [schemas.RankedItem(item=entry.item, title=titles[entry.item], score=entry.score) for entry in ranked]
        return schemas.RecommendAnswer(**describe(model, known["history"], ignored), items=items)

    async def score(self, body: schemas.ScoreRequest, request: Request) -> schemas.ScoreAnswer:
        """Return the scores that `body` asks for; errors as in `recommend`."""
        model = self._find_model(body.model, ANY_MODEL, "body")
        known, ignored = split_known({"history": body.history, "items": body.items}, model.catalogue.titles)
        users, unknown_user = split_known({"user": [body.user] if body.user else []}, model.users)
        reads_empty = isinstance(model, RatingModel)
        scores: list[tuple[float, float | None]] = []
        if isinstance(model, NextItemModel) and not known["history"]:
            scores = [(model.counts[item], None) for item in known["items"]]
        elif known["items"]:
            wanted = ScoreRequest(known["history"], known["items"], next(iter(users["user"]), None))
            size = len(known["items"]) if reads_empty else 1
            scores = await self._compute(request, self.queue.submit(model.score, wanted, size))
        return schemas.ScoreAnswer(
            **describe(model, known["history"] or reads_empty, ignored | unknown_user),
            scores=[
                schemas.ScoredItem(item=item, score=score, probability=probability)
                for item, (score, probability) in zip(known["items"], scores, strict=True)
            ],
        )

    def find_items(self, asked: schemas.ItemsQuery) -> schemas.ItemsAnswer:
        """Return items by the words of their titles; error 422 if there is no such model."""
        model = self._find_model(asked.model, ANY_MODEL, "query")
        titles = model.catalogue.titles
        found = [
            schemas.Item(item=item, title=titles[item]) for item in model.catalogue.find(asked.query, asked.limit)
        ]
        return schemas.ItemsAnswer(model=model.name, catalogue=model.version, items=found)

    def list_models(self) -> list[schemas.ModelInfo]:
        """Return the served models."""
        return [
            schemas.ModelInfo(
                name=model.name,
                kind=model.kind,
                dataset=model.dataset.name,
                catalogue=model.version,
                items=len(model.catalogue.titles),
                max_k=model.max_k(False) if isinstance(model, NextItemModel) else None,
                max_his_len=model.max_his_len,
                fusions=list(model.fused) if isinstance(model, NextItemModel) else [],
            )
            for model in self.registry.models.values()
        ]

    def _find_model(self, name: str | None, kinds: tuple[type[Model], ...], place: str) -> Model:
        """Return the served model `name`, or without a name the first of these kinds; error 422 if there is none."""
        fitting = {key: model for key, model in self.registry.models.items() if isinstance(model, kinds)}
        model = next(iter(fitting.values()), None) if name is None else fitting.get(name)
        if model is None:
            names = ", ".join(fitting) or "none: no served model can answer this"
            raise invalid((place, "model"), f"should be one of {names}")
        return model

    async def _compute(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of `work`, which is cancelled when the client leaves (499) or at the deadline (504)."""
        task, left = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect(request))
        try:
            done, _ = await asyncio.wait({task, left}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
        finally:
            task.cancel()
            left.cancel()
        self.queue.metrics.given_up.labels("disconnect" if left in done else "deadline").inc()
        if left in done:
            raise HTTPException(499, "the client left")
        raise HTTPException(504, f"no answer within {self.timeout:g} seconds")


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has closed the connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def invalid(place: Sequence[str], message: str) -> RequestValidationError:
    """Return error 422 that names the field of a request."""
    return RequestValidationError([{"loc": place, "msg": message, "type": "value_error"}])


def split_known(
    fields: dict[str, list[str]], known: Container[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return field -> its known ids in their order, and field -> its unknown ids, each once."""
    present = {field: [item for item in ids if item in known] for field, ids in fields.items()}
    unknown = {field: list(dict.fromkeys(i for i in ids if i not in known)) for field, ids in fields.items()}
    return present, unknown


def describe(model: ServedModel, is_by_model: object, ignored: dict[str, list[str]]) -> dict[str, Any]:
    """Return the fields of `ModelAnswer`."""
    source: schemas.Source = "model" if is_by_model else "popularity"
    unknown = {field: ids for field, ids in ignored.items() if ids}
    return {"model": model.name, "catalogue": model.version, "source": source, "ignored": unknown}
