"""The HTTP application: routes, and what surrounds them. `server` runs it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from quatom.engine.engine import Engine
from quatom.errors import QuatomError
from quatom.serving import responses
from quatom.serving.agent_routes import add_agent_routes
from quatom.serving.api_errors import ApiError, from_quatom, json_response
from quatom.serving.async_engine import AsyncEngine
from quatom.serving.chat import create_chat_completion
from quatom.serving.chat_protocol import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from quatom.serving.completions import create_completion
from quatom.serving.dialogue import DialogueStyle
from quatom.serving.generation import Service
from quatom.serving.hang_watch import watched
from quatom.serving.metrics import Metrics
from quatom.serving.middleware import (
    ApiKeyMiddleware,
    RequestLogMiddleware,
    UnexpectedErrorMiddleware,
)
from quatom.serving.openapi import describe
from quatom.serving.prompt import PromptEncoder
from quatom.serving.protocol import CompletionRequest
from quatom.serving.routing import errors, post_route, read_body
from quatom.serving.thread_engine import ThreadEngine
from quatom.serving.tokenize import detokenize, tokenize
from quatom.version import __version__

STATIC = Path(__file__).parent / "static"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the application needs besides an engine."""

    model_names: tuple[str, ...]
    """Names that requests may use."""
    api_keys: tuple[str, ...] = ()
    """One of them is asked of every request but those to OPEN_PATHS; none: everybody may ask."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may use this server from a browser; "*": all."""
    max_body_bytes: int = 16 * 2**20
    """Larger bodies are refused (413)."""
    hang_seconds: float = 60.0
    """An engine that makes no progress for so long hangs; 0: it may take any time."""
    dialogue: DialogueStyle = field(default_factory=DialogueStyle)
    """What is said of how the model converses."""


def create_app(
    engine: Engine | AsyncEngine,
    options: ServerOptions,
    *,
    on_engine_stop: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application around an engine, which runs while the application does.

    Args:
        engine: a plain one runs in a thread of this process.
        options: names, keys and limits.
        on_engine_stop: called when the engine has failed for good.
    """
    async_engine = engine if isinstance(engine, AsyncEngine) else ThreadEngine(engine)
    metrics = Metrics(async_engine, options.model_names[0])
    async_engine.observe, async_engine.on_stop = metrics.observe, on_engine_stop
    encoder = PromptEncoder(
        async_engine.tokenizer, options.dialogue, max_tokens=async_engine.facts.max_model_len
    )
    service = Service(async_engine, encoder, options.model_names)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await async_engine.start()
        async with watched(async_engine, options.hang_seconds):
            yield
        await async_engine.stop()

    app = FastAPI(
        title="Quatom",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # Swagger's page would load scripts from the network
        redoc_url=None,
    )
    app.state.async_engine = async_engine
    _add_generation_routes(app, service, options.max_body_bytes)
    add_agent_routes(app, service, options.max_body_bytes)
    _add_information_routes(app, service, metrics)
    _add_page(app)
    _add_error_handlers(app)
    _add_middleware(app, options)
    describe(app)
    return app


def _add_middleware(app: FastAPI, options: ServerOptions) -> None:
    """From the inside to the outside: an answer of any of them passes those after it."""
    app.add_middleware(UnexpectedErrorMiddleware)
    if options.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=options.api_keys)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-ID", "Retry-After"),
        )
    app.add_middleware(RequestLogMiddleware)


def _add_generation_routes(app: FastAPI, service: Service, limit: int) -> None:
    route = partial(post_route, app)

    @route("/v1/completions", CompletionRequest, responses.CompletionResponse, streams=True)
    async def completions(http: Request) -> Response:
        """Complete prompts: text, token ids, or lists of either."""
        body = await read_body(http, CompletionRequest, limit)
        return await create_completion(service, body, http)

    @route(
        "/v1/chat/completions",
        ChatCompletionRequest,
        responses.ChatCompletionResponse,
        streams=True,
    )
    async def chat_completions(http: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(http, ChatCompletionRequest, limit)
        return await create_chat_completion(service, body, http)

    @route("/tokenize", TokenizeRequest, responses.TokenizeResponse)
    async def tokenize_text(http: Request) -> Response:
        """Token ids of a text or a conversation."""
        return await tokenize(service, await read_body(http, TokenizeRequest, limit), http)

    @route("/detokenize", DetokenizeRequest, responses.DetokenizeResponse)
    async def detokenize_tokens(http: Request) -> Response:
        """Text of token ids."""
        return await detokenize(service, await read_body(http, DetokenizeRequest, limit), http)


def _add_information_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "quatom",
            "root": service.model_names[0],
            "max_model_len": service.engine.facts.max_model_len,
        }

    def get(path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """A GET route that answers HEAD too, as HTTP asks of every server."""

        def add(endpoint: Endpoint) -> Endpoint:
            app.get(path, **options)(endpoint)
            app.head(path, include_in_schema=False)(endpoint)
            return endpoint

        return add

    @get("/v1/models", responses={200: {"model": responses.ModelList}}, response_model=None)
    async def models() -> Response:
        """All models: one, under each of its names."""
        return json_response({"object": "list", "data": [card(n) for n in service.model_names]})

    @get(
        "/v1/models/{name:path}",
        responses={200: {"model": responses.ModelCard}, **errors(404)},
        response_model=None,
    )
    async def model(name: str) -> Response:
        """One model."""
        return json_response(card(service.check_model(name)))

    @get("/version", responses={200: {"model": responses.VersionResponse}}, response_model=None)
    async def version() -> Response:
        """This server's version."""
        return json_response({"version": __version__})

    @get("/ping", response_class=Response, responses=errors(503))
    @get("/health", response_class=Response, responses=errors(503))
    async def health() -> Response:
        """200 while the engine runs."""
        if service.engine.error is not None:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                service.engine.error,
                kind="server_error",
                code="engine_error",
            )
        return Response()

    @get("/metrics", response_class=Response)
    async def exposition() -> Response:
        """Prometheus metrics."""
        return Response(metrics.exposition(), media_type=METRICS_TYPE)


def _add_page(app: FastAPI) -> None:
    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        # The page loads nothing from elsewhere, and nothing may be injected into it.
        return FileResponse(
            STATIC / "index.html",
            headers={"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"},
        )

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(http: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(QuatomError)
    async def quatom_error(http: Request, error: QuatomError) -> Response:
        return from_quatom(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return ApiError(
            error.status_code, f"{http.url.path}: {error.detail}", headers=headers
        ).response()
