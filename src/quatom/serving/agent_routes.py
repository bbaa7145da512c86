"""Routes beside completions and chat: /v1/responses and /v1/embeddings."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from quatom.serving.embeddings import (
    EmbeddingRequest,
    EmbeddingResponse,
    create_embeddings,
)
from quatom.serving.generation import Service
from quatom.serving.responses_api import create_response
from quatom.serving.responses_protocol import ResponseObject, ResponsesRequest
from quatom.serving.routing import post_route, read_body


def add_agent_routes(app: FastAPI, service: Service, limit: int) -> None:
    """Add the routes; bodies of more than `limit` bytes are refused."""

    @post_route(app, "/v1/responses", ResponsesRequest, ResponseObject, streams=True)
    async def responses(http: Request) -> Response:
        """Answer a conversation of items; nothing is stored."""
        body = await read_body(http, ResponsesRequest, limit)
        return await create_response(service, body, http)

    @post_route(app, "/v1/embeddings", EmbeddingRequest, EmbeddingResponse)
    async def embeddings(http: Request) -> Response:
        """Vectors of texts."""
        body = await read_body(http, EmbeddingRequest, limit)
        return await create_embeddings(service, body, http)
