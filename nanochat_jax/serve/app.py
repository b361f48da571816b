"""The application: routes, the page, and what surrounds them. `create_app` is the whole of it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from nanochat_jax.engine.requests import Request as EngineRequest
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve import metrics
from nanochat_jax.serve.errors import ErrorBody, install_handlers, unavailable
from nanochat_jax.serve.middleware import (
    LOCAL_HOSTS,
    ApiKeys,
    BodyLimit,
    Gate,
    HostCheck,
    Observe,
    RateLimit,
    read_keys,
)
from nanochat_jax.serve.openai import (
    chat_answer,
    chat_events,
    chat_job,
    completion_answer,
    completion_events,
    completion_jobs,
    model_not_found,
)
from nanochat_jax.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Generate,
    check_chat,
    check_completion,
    document_limits,
)
from nanochat_jax.serve.service import Service, Worker
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.serve.stream import EventStream, Generation, running
from nanochat_jax.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"
DESCRIPTION = "A nanochat model behind OpenAI's API. Errors have OpenAI's shape."
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is"},
    "5XX": {"model": ErrorBody, "description": "The server is not able to at the moment"},
}


def create_app(
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    config: ServeConfig,
    progress: Callable[[str], object] = lambda _: None,
) -> FastAPI:
    """The server of one model; `app.state.service` is what its routes work with.

    The scheduler's thread lives as long as the application's lifespan; `progress` is told what it
    compiles first. ValueError for a file of API keys that cannot be used.
    """
    worker = Worker(scheduler, progress)
    service = Service(scheduler, tokenizer, meta, config, worker, metrics.Metrics(scheduler))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        service.draining = True
        service.cancel_all()
        worker.stop()

    app = FastAPI(
        title="nanochat_jax",
        description=DESCRIPTION,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.service = service
    install_handlers(app)
    _add_status(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    _add_page(app)
    document_limits(app.openapi(), config)
    _surround(app, service)
    return app


def _surround(app: FastAPI, service: Service) -> None:
    """What requests pass on their way in; the last one added is passed first."""
    config = service.config
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.body_seconds)
    keys = ApiKeys(read_keys(config.api_keys_file))
    app.add_middleware(Gate, keys=keys, rate=RateLimit(config.rate_limit))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    if config.is_local or config.allowed_hosts:
        app.add_middleware(HostCheck, hosts=(*LOCAL_HOSTS, *config.allowed_hosts))
    app.add_middleware(Observe, metrics=service.metrics, log=config.access_log)


# --- routes ---------------------------------------------------------------------------------------


def _add_status(app: FastAPI, service: Service) -> None:
    not_now: dict[int | str, Any] = {503: {"model": Status, "description": "Not now"}}

    @app.get("/health", responses=not_now)
    async def health(response: Response) -> Status:
        """Whether the process works; only a restart helps where it does not."""
        failed = service.worker.phase == "failed"
        response.status_code = 503 if failed else 200
        return Status(status="failed" if failed else "ok")

    @app.get("/ready", responses=not_now)
    async def ready(response: Response) -> Status:
        """Whether to send requests here: not while programs are compiled, nor at the end."""
        status = "draining" if service.draining else service.worker.phase
        response.status_code = 200 if status == "ready" else 503
        return Status(status=status)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


class Status(BaseModel):
    """The health of the server."""

    status: str


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{model_id}")
    async def model(model_id: str) -> dict[str, Any]:
        """The same by its name."""
        if model_id != service.model_id:
            raise model_not_found(model_id[:100], service)
        return service.model()


def _add_generation(app: FastAPI, service: Service) -> None:
    streams: dict[int | str, Any] = {200: {"content": {EventStream.media_type: {}}}}

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        check_chat(asked, service.config)
        job = chat_job(asked, service)
        generation = _start(service, [job.request], asked)
        if asked.stream:
            events = chat_events(service, generation, asked, job.dropped)
            return EventStream(service, generation, events)
        async with running(service, generation, request.scope, request.receive):
            return JSONResponse(await chat_answer(service, generation, asked, job.dropped))

    @app.post("/v1/completions", responses=streams)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """How one or more texts go on."""
        check_completion(asked, service.config)
        generation = _start(service, completion_jobs(asked, service), asked)
        if asked.stream:
            events = completion_events(service, generation, asked)
            return EventStream(service, generation, events)
        async with running(service, generation, request.scope, request.receive):
            return JSONResponse(await completion_answer(service, generation, asked))


def _start(service: Service, requests: list[EngineRequest], asked: Generate) -> Generation:
    if service.draining:
        raise unavailable("the server is shutting down", "shutting_down", retry_after=10)
    if service.worker.phase == "failed":
        raise unavailable("the engine has failed and must be restarted", "failed", retry_after=60)
    generation = Generation(
        service.scheduler, requests, service.tokenizer, asked.stops, service.metrics
    )
    generation.start()
    return generation


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=REVALIDATE)

    app.mount("/static", PageFiles(directory=STATIC), name="static")


REVALIDATE = {"Cache-Control": "no-cache"}  # a new version of the server, a new page


class PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            response = await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code != 404:
                raise
            raise HTTPException(404) from None
        response.headers.update(REVALIDATE)
        return response
