"""The HTTP application: routes, and what surrounds them. `server` runs it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

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
from quatom.serving.metrics import Metrics
from quatom.serving.middleware import ApiKeyMiddleware, RequestLogMiddleware
from quatom.serving.openapi import describe
from quatom.serving.prompt import PromptEncoder
from quatom.serving.protocol import CompletionRequest
from quatom.serving.routing import errors, post_route, read_body
from quatom.serving.tokenize import detokenize, tokenize
from quatom.version import __version__

STATIC = Path(__file__).parent / "static"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the application needs besides an engine."""

    model_names: tuple[str, ...]
    """Names that requests may use."""
    api_key: str | None = None
    """Asked of every request but those to /health and /metrics."""
    max_body_bytes: int = 16 * 2**20
    """Larger bodies are refused (413)."""
    dialogue: DialogueStyle = field(default_factory=DialogueStyle)
    """What is said of how the model converses."""


def create_app(
    engine: Engine,
    options: ServerOptions,
    *,
    on_engine_stop: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application around an engine, which runs while the application does."""
    metrics = Metrics(engine, options.model_names[0])
    async_engine = AsyncEngine(engine, observe=metrics.observe, on_stop=on_engine_stop)
    encoder = PromptEncoder(engine.tokenizer, options.dialogue)
    service = Service(async_engine, encoder, options.model_names)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
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
    if options.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=options.api_key)
    app.add_middleware(RequestLogMiddleware)
    describe(app)
    return app


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
        return await tokenize(service, await read_body(http, TokenizeRequest, limit))

    @route("/detokenize", DetokenizeRequest, responses.DetokenizeResponse)
    async def detokenize_tokens(http: Request) -> Response:
        """Text of token ids."""
        return await detokenize(service, await read_body(http, DetokenizeRequest, limit))


def _add_information_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "quatom",
            "root": service.model_names[0],
            "max_model_len": service.engine.engine.max_model_len,
        }

    @app.get("/v1/models", responses={200: {"model": responses.ModelList}}, response_model=None)
    async def models() -> Response:
        """All models: one, under each of its names."""
        return json_response({"object": "list", "data": [card(n) for n in service.model_names]})

    @app.get(
        "/v1/models/{name:path}",
        responses={200: {"model": responses.ModelCard}, **errors(404)},
        response_model=None,
    )
    async def model(name: str) -> Response:
        """One model."""
        return json_response(card(service.check_model(name)))

    @app.get("/version", responses={200: {"model": responses.VersionResponse}}, response_model=None)
    async def version() -> Response:
        """This server's version."""
        return json_response({"version": __version__})

    @app.get("/health", response_class=Response, responses=errors(503))
    async def health() -> Response:
        """200 while the engine runs."""
        if service.engine.error is not None:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the engine has stopped: {service.engine.error}",
                kind="server_error",
                code="engine_error",
            )
        return Response()

    async def exposition() -> Response:
        """Prometheus metrics."""
        return Response(metrics.exposition(), media_type=METRICS_TYPE)

    app.get("/metrics", response_class=Response)(exposition)
    app.head("/metrics", include_in_schema=False)(exposition)


def _add_page(app: FastAPI) -> None:
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

    @app.exception_handler(Exception)
    async def unexpected(http: Request, error: Exception) -> Response:
        return ApiError(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"{type(error).__name__} while answering; the log has the details",
            kind="server_error",
            code="internal_error",
        ).response()
