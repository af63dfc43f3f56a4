"""Routes of the server, its answers to errors, and what it does at its start and end."""

import asyncio
import json
import logging
import signal
import traceback
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from reclingua.serving import schemas
from reclingua.serving.access import BodyDeadline
from reclingua.serving.batching import QueueFullError
from reclingua.serving.metrics import RequestMetrics
from reclingua.serving.service import Service, invalid
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


def build_router(service: Service) -> APIRouter:
    """Return the routes that need an API key, if there are keys."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(service.keys.check_api)], responses=NO_ANSWER)

    @router.post("/recommend")
    async def recommend(body: schemas.RecommendRequest, request: Request) -> schemas.RecommendAnswer:
        """Return the best items after a history; the most popular ones if it has no known item."""
        return await service.recommend(body, request)

    @router.post("/score")
    async def score(body: schemas.ScoreRequest, request: Request) -> schemas.ScoreAnswer:
        """Return the scores of given items after a history."""
        return await service.score(body, request)

    @router.get("/items")
    def items(asked: Annotated[schemas.ItemsQuery, Query()]) -> schemas.ItemsAnswer:
        """Return items by the words of their titles."""
        return service.find_items(asked)

    @router.get("/models")
    async def models() -> list[schemas.ModelInfo]:
        """Return the served models."""
        return service.list_models()

    return router


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
