"""POST /tokenize and /detokenize, in vLLM's form."""

from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quatom.errors import RequestError
from quatom.serving.api_errors import json_response
from quatom.serving.chat_protocol import DetokenizeRequest, TokenizeRequest
from quatom.serving.generation import Service
from quatom.serving.threads import in_thread


async def tokenize(service: Service, body: TokenizeRequest, http: HttpRequest) -> Response:
    """Token ids of a text or of a conversation under the chat template."""
    service.check_model(body.model)
    encoder = service.encoder
    if body.messages is not None:
        token_ids = await in_thread(http, partial(encoder.encode_chat, body.messages, body))
    else:
        special = body.add_special_tokens is not False
        encode = partial(encoder.encode_all, body.prompt or "", special=special)
        token_ids = await in_thread(http, encode)
    content = {
        "count": len(token_ids),
        "max_model_len": service.engine.facts.max_model_len,
        "tokens": token_ids,
    }
    if body.return_token_strs:
        content["token_strs"] = [encoder.token_string(t) for t in token_ids]
    return json_response(content)


async def detokenize(service: Service, body: DetokenizeRequest, http: HttpRequest) -> Response:
    """Text of token ids."""
    service.check_model(body.model)
    vocab_size = service.engine.facts.vocab_size
    if body.tokens and max(body.tokens) >= vocab_size:
        raise RequestError(
            f"tokens holds id {max(body.tokens)}; the model has {vocab_size} tokens, 0 to "
            f"{vocab_size - 1}"
        )
    prompt = await in_thread(http, partial(service.encoder.decode, body.tokens))
    return json_response({"prompt": prompt})
