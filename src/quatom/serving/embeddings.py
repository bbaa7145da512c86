"""POST /v1/embeddings: the last hidden state of each text's last token, at length one."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.engine.sampling import SamplingParams
from quatom.serving.api_errors import json_response
from quatom.serving.closed_model import ClosedModel, Listed
from quatom.serving.generation import Generation, Service
from quatom.serving.protocol import MAX_PROMPTS, TokenIds
from quatom.serving.threads import in_thread

PARAMS = SamplingParams(max_tokens=0, temperature=0.0, embed=True)


class EmbeddingRequest(ClosedModel):
    """POST /v1/embeddings."""

    input: (
        str
        | TokenIds
        | Annotated[Listed[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Listed[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    """Models whose embeddings can be cut are not known."""
    user: str | None = None
    add_special_tokens: bool | None = None

    def inputs(self) -> list[str | list[int]]:
        """One entry for each text."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[t for t in self.input if isinstance(t, int)]]
        return [text for text in self.input if not isinstance(text, int)]


class Embedding(BaseModel):
    """One text's."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Result of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def create_embeddings(
    service: Service, body: EmbeddingRequest, http: HttpRequest
) -> Response:
    """Embed every text."""
    model = service.check_model(body.model)
    special = body.add_special_tokens is not False

    def encode() -> list[list[int]]:
        return [service.encoder.encode(text, special=special) for text in body.inputs()]

    generation = Generation(service, "embd", model, PARAMS, http)
    await generation.prepare(await in_thread(http, encode))
    await generation.finish()
    num_tokens = sum(len(output.prompt_token_ids) for output in generation.outputs)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(output.outputs[0].hidden, body)}
        for i, output in enumerate(generation.outputs)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _encoded(hidden: tuple[float, ...], body: EmbeddingRequest) -> Any:
    """float32 numbers of a vector of length one, or their little-endian bytes in base64."""
    vector = np.array(hidden, dtype=np.float64)
    unit = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype("<f4")
    if body.encoding_format == "base64":
        return base64.b64encode(unit.tobytes()).decode()
    return unit.tolist()
