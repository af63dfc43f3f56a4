"""Routes of the server: validation, the queue, deadlines, and the answers."""

import asyncio
import json
import logging
import signal
import traceback
from collections.abc import AsyncIterator, Container, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from reclingua.serving import schemas
from reclingua.serving.access import BodyDeadline, Keys
from reclingua.serving.batching import BatchQueue, QueueFullError
from reclingua.serving.metrics import RequestMetrics
from reclingua.serving.models import ListRequest, NextItemModel, RatingModel, ScoreRequest, ServedModel
from reclingua.serving.registry import ModelRegistry
from reclingua.utils.access import HostCheck
from reclingua.utils.errors import InputError

MAX_BODY = 2**20  # bytes
MAX_ERRORS = 5  # of a request that are listed
MAX_NAME = 100  # characters of an unknown field that are shown
DESCRIPTION = """Next items and scores by models of RecLingua. Ids are those of the dataset folder."""
NO_ANSWER: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Problem, "description": "The body cannot be read"},
    401: {"model": schemas.Problem, "description": "The key is missing or wrong"},
    408: {"model": schemas.Problem, "description": "The body did not arrive in time"},
    413: {"description": "The body is too large"},
    503: {"model": schemas.Problem, "description": "The queue is full; Retry-After has the seconds to wait"},
    504: {"model": schemas.Problem, "description": "No answer before the deadline"},
}

logger = logging.getLogger("reclingua.serving")
Model = TypeVar("Model", NextItemModel, ServedModel)
ANY_MODEL: tuple[type[ServedModel], ...] = (NextItemModel, RatingModel)


class Service:
    """What the routes share.

    Args:
        timeout: seconds from a request to its deadline.
    """

    def __init__(self, registry: ModelRegistry, queue: BatchQueue, keys: Keys, timeout: float):
        self.registry, self.queue, self.keys, self.timeout = registry, queue, keys, timeout
        self.is_draining = False

    def find_model(self, name: str | None, kinds: tuple[type[Model], ...], place: str) -> Model:
        """Return the served model `name`, or without a name the first of these kinds; error 422 if there is none."""
        fitting = {key: model for key, model in self.registry.models.items() if isinstance(model, kinds)}
        model = next(iter(fitting.values()), None) if name is None else fitting.get(name)
        if model is None:
            names = ", ".join(fitting) or "none: no served model can answer this"
            raise invalid((place, "model"), f"should be one of {names}")
        return model

    async def answer(self, request: Request, work: Coroutine[Any, Any, Any]) -> Any:
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


def split_known(items: Iterable[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """Return the known items in their order, and the others, each once."""
    present: list[str] = []
    unknown: dict[str, None] = {}
    for item in items:
        if item in known:
            present.append(item)
        else:
            unknown[item] = None
    return present, list(unknown)


def build_router(service: Service) -> APIRouter:
    """Return the routes that need an API key, if there are keys."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(service.keys.check_api)], responses=NO_ANSWER)

    @router.post("/recommend")
    async def recommend(body: schemas.RecommendRequest, request: Request) -> schemas.RecommendAnswer:
        """Return the best items after a history; the most popular ones if it has no known item."""
        model = service.find_model(body.model, (NextItemModel,), "body")
        longest = model.max_k(body.fuse)
        k = body.k if "k" in body.model_fields_set else min(body.k, longest)
        if k > longest:
            raise invalid(("body", "k"), f"should be {longest} at most")
        if body.fuse and body.exclude_seen not in model.fused:
            seen = "with" if body.exclude_seen else "without"
            raise invalid(("body", "fuse"), f"{model.name} holds no fusion {seen} exclude_seen")
        known = model.catalogue
        history, unknown = split_known(body.history, known)
        excluded, unknown_excluded = split_known(body.exclude, known)
        candidates, unknown_candidates = split_known(body.candidates or [], known)
        left_out = set(excluded)
        if body.candidates is not None:
            left_out |= known.titles.keys() - candidates
        if history:
            compute = model.recommend_fused if body.fuse else model.recommend
            wanted = ListRequest(history, k, left_out, body.exclude_seen)
            ranked = await service.answer(request, service.queue.submit(compute, wanted))
        else:
            ranked = [entry for entry in model.popular if entry.item not in left_out][:k]
        ignored = {"history": unknown, "exclude": unknown_excluded, "candidates": unknown_candidates}
        return schemas.RecommendAnswer(
            **describe(model, history, ignored),
            items=[
                schemas.RankedItem(item=entry.item, title=known.titles[entry.item], score=entry.score)
                for entry in ranked
            ],
        )

    @router.post("/score")
    async def score(body: schemas.ScoreRequest, request: Request) -> schemas.ScoreAnswer:
        """Return the scores of given items after a history."""
        model = service.find_model(body.model, ANY_MODEL, "body")
        history, unknown = split_known(body.history, model.catalogue)
        items, unknown_items = split_known(body.items, model.catalogue)
        ignored = {"history": unknown, "items": unknown_items}
        users, ignored["user"] = split_known([body.user] if body.user else [], model.users)
        needs_history = isinstance(model, NextItemModel)
        scores: list[tuple[float, float | None]] = []
        if isinstance(model, NextItemModel) and not history:
            scores = [(model.counts[item], None) for item in items]
        elif items:
            wanted = ScoreRequest(history, items, users[0] if users else None)
            size = 1 if needs_history else len(items)
            scores = await service.answer(request, service.queue.submit(model.score, wanted, size))
        return schemas.ScoreAnswer(
            **describe(model, history or not needs_history, ignored),
            scores=[
                schemas.ScoredItem(item=item, score=value, probability=probability)
                for item, (value, probability) in zip(items, scores, strict=True)
            ],
        )

    @router.get("/items")
    def items(asked: Annotated[schemas.ItemsQuery, Query()]) -> schemas.ItemsAnswer:
        """Return items by the words of their titles."""
        model = service.find_model(asked.model, ANY_MODEL, "query")
        titles = model.catalogue.titles
        items = [
            schemas.Item(item=item, title=titles[item]) for item in model.catalogue.find(asked.query, asked.limit)
        ]
        return schemas.ItemsAnswer(model=model.name, catalogue=model.version, items=items)

    @router.get("/models")
    async def models() -> list[schemas.ModelInfo]:
        """Return the served models."""
        return [
            schemas.ModelInfo(
                name=model.name,
                kind=model.kind,
                dataset=model.dataset.name,
                catalogue=model.version,
                items=len(model.catalogue.titles),
                max_k=model.max_k(False) if isinstance(model, NextItemModel) else None,
                fusions=list(model.fused) if isinstance(model, NextItemModel) else [],
            )
            for model in service.registry.models.values()
        ]

    return router


def describe(model: ServedModel, is_by_model: object, ignored: dict[str, list[str]]) -> dict[str, Any]:
    """Return the fields of `ModelAnswer`."""
    source: schemas.Source = "model" if is_by_model else "popularity"
    unknown = {field: ids for field, ids in ignored.items() if ids}
    return {"model": model.name, "catalogue": model.version, "source": source, "ignored": unknown}


def build_state_router(service: Service) -> APIRouter:
    """Return the routes of the server's state and of reloads."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> schemas.Status:
        """Return 200 as long as the server runs."""
        return schemas.Status(status="ok")

    @router.get("/ready", responses={503: {"model": schemas.Status}})
    async def ready(response: Response) -> schemas.Status:
        """Return 200 if a request would be accepted now; 503 while the queue is full or the server shuts down."""
        status = "draining" if service.is_draining else "queue full" if service.queue.is_full else "ready"
        response.status_code = 200 if status == "ready" else 503
        return schemas.Status(status=status)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Return the metrics in the text format of Prometheus."""
        return PlainTextResponse(service.queue.metrics.text(), media_type="text/plain; version=0.0.4")

    refusals: dict[int | str, dict[str, Any]] = {
        401: NO_ANSWER[401],
        403: {"model": schemas.Problem, "description": "The server has no admin key"},
        409: {"model": schemas.Problem, "description": "The reload failed, the old catalogues stay"},
    }

    @router.post("/v1/admin/reload", dependencies=[Depends(service.keys.check_admin)], responses=refusals)
    async def reload() -> schemas.ReloadAnswer:
        """Open checkpoints and datasets anew; requests that were accepted before are finished on the old ones."""
        try:
            return schemas.ReloadAnswer(catalogues=await service.registry.reload())
        except InputError as error:
            raise HTTPException(409, str(error)) from None

    return router


def build_app(service: Service, hosts: Iterable[str]) -> FastAPI:
    """Return the app that answers requests to `hosts`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        computing, reloading = loop.create_task(service.queue.run()), set()

        async def reload() -> None:
            with suppress(InputError):  # which is in the log
                await service.registry.reload()

        def reload_on_signal() -> None:
            task = loop.create_task(reload())
            reloading.add(task)  # a task that nothing refers to can vanish
            task.add_done_callback(reloading.discard)

        loop.add_signal_handler(signal.SIGHUP, reload_on_signal)
        yield
        computing.cancel()
        service.queue.close()

    app = FastAPI(
        title="RecLingua",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        max_body_size=MAX_BODY,
    )
    app.include_router(build_router(service))
    app.include_router(build_state_router(service))
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(QueueFullError, answer_queue_full)
    app.add_exception_handler(InputError, answer_input_error)
    app.add_exception_handler(Exception, answer_failure)
    app.add_middleware(BodyDeadline, seconds=service.timeout)
    app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(RequestMetrics, metrics=service.queue.metrics)
    return app


async def answer_invalid(request: Request, error: Any) -> Response:
    """Return 422 with the fields that are invalid, without their values."""
    errors = [
        {"loc": [part if isinstance(part, int) else part[:MAX_NAME] for part in entry["loc"]]}
        | {"msg": entry["msg"], "type": entry["type"]}
        for entry in error.errors()[:MAX_ERRORS]
    ]
    # Escaped, since the name of an unknown field can be no valid Unicode.
    return Response(json.dumps({"detail": errors}), 422, media_type="application/json")


async def answer_queue_full(request: Request, error: Any) -> Response:
    """Return 503 with the seconds to wait."""
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": str(error.retry_after)})


async def answer_input_error(request: Request, error: Any) -> Response:
    """Return 422 for what a model refuses, as a prompt that is too long."""
    return await answer_invalid(request, invalid(["body"], str(error)))


async def answer_failure(request: Request, error: Exception) -> Response:
    """Return 500; the log has the place of the failure, and no message, which could contain a history."""
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", request.scope.get("path"), type(error).__name__, place)
    return JSONResponse({"detail": "the server failed; its log states where"}, 500)
