"""The application: routes, the page, and what surrounds them. `create_app` is the whole of it."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.serve import metrics, openai
from nanochat_jax.serve.errors import ErrorBody, install_handlers
from nanochat_jax.serve.middleware import (
    LOCAL_HOSTS,
    BodyLimit,
    Gate,
    HostCheck,
    Observe,
    read_keys,
)
from nanochat_jax.serve.schema import document_limits
from nanochat_jax.serve.service import Service
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"
REVALIDATE = {"Cache-Control": "no-cache"}  # a new version of the server, a new page
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

    The scheduler's thread lives as long as the application's lifespan; it calls `progress` with
    each program that it compiles first. ValueError for a file of API keys that cannot be used.
    """
    service = Service(scheduler, tokenizer, meta, config, progress)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.draining = True
        service.cancel_all()
        service.worker.stop()

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
    _add_health(app, service)
    openai.add_routes(app, service)
    _add_page(app)
    document_limits(app.openapi(), config)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """What requests pass on their way in; the last one added is passed first."""
    config = service.config
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.body_seconds)
    keys = read_keys(config.api_keys_file)
    app.add_middleware(Gate, keys=keys, per_minute=config.rate_limit)
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


class Status(BaseModel):
    """The health of the server."""

    status: str


def _add_health(app: FastAPI, service: Service) -> None:
    not_now: dict[int | str, Any] = {503: {"model": Status, "description": "Not now"}}

    @app.get("/health", responses=not_now)
    async def health(response: Response) -> Status:
        """Whether the process works; where it does not, only a restart helps."""
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


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=REVALIDATE)

    app.mount("/static", PageFiles(directory=STATIC), name="static")


class PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(REVALIDATE)
        return response
