"""OpenAI's endpoints: what a request asks the scheduler for, and its answer in OpenAI's shapes.

Beyond OpenAI's, a chat has `dropped_messages`, `parts` where the model used Python, and tokens with
a `text_offset`.
"""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import fields
from typing import Any

import fastapi
from fastapi.responses import JSONResponse, Response

from nanochat_jax.engine.requests import Request, stop_ids
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.serve.errors import ApiError, bad_request
from nanochat_jax.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Generate,
    Message,
    check_chat,
    check_completion,
)
from nanochat_jax.serve.service import Service
from nanochat_jax.serve.stream import EventStream, Generation, Json, Update
from nanochat_jax.serve.text import (
    PlacedToken,
    TextPiece,
    TooLong,
    chat_request,
    parts_of,
)
from nanochat_jax.tokenizer import Tokenizer

TEMPERATURE, TOP_K, MAX_TOKENS = 0.8, 50, 512  # where a request names none
LEAST_LOGPROB = -9999.0  # what OpenAI says for "impossible", since JSON has no infinity
STREAMS: dict[int | str, Any] = {200: {"content": {EventStream.media_type: {}}}}


def add_routes(app: fastapi.FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Json:
        """The one model that is served, with the limits of a request."""
        return {"object": "list", "data": [service.model]}

    @app.get("/v1/models/{model_id}")
    async def model(model_id: str) -> Json:
        """The same by its name."""
        _check_model(model_id, service)
        return service.model

    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat(body: ChatRequest, request: fastapi.Request) -> Response:
        """The next message of a conversation."""
        check_chat(body, service.config)
        engine_request, dropped = _chat_request(body, service)
        generation = Generation(service, [engine_request], body.stops)
        generation.start()
        if body.stream:
            return EventStream(generation, _chat_events(generation, body, dropped))
        async with generation.running(request.scope, request.receive):
            return JSONResponse(await _chat_answer(generation, body, dropped))

    @app.post("/v1/completions", responses=STREAMS)
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response:
        """The continuation of one or more texts."""
        check_completion(body, service.config)
        generation = Generation(service, _completion_requests(body, service), body.stops)
        generation.start()
        if body.stream:
            return EventStream(generation, _completion_events(generation, body))
        async with generation.running(request.scope, request.receive):
            return JSONResponse(await _completion_answer(generation, body))


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.model_id:
        message = f"there is no model {name[:100]!r} here, only {service.model_id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


# --- what a request asks the scheduler for --------------------------------------------------------


def _chat_request(body: ChatRequest, service: Service) -> tuple[Request, int]:
    """The engine's request, and how many of the oldest messages the model does not see.

    ApiError for another model's name, for no conversation, and for one too long.
    """
    _check_model(body.model, service)
    try:
        return chat_request(
            service.tokenizer,
            service.prompt_format,
            [_as_conversation(message) for message in body.messages],
            context=service.context,
            max_tokens=body.max_completion_tokens or body.max_tokens or _default_tokens(service),
            sampling=_sampling(body, service),
            n=body.n or 1,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
        )
    except TooLong as error:
        raise bad_request(str(error), "messages", "context_length_exceeded") from None
    except ValueError as error:
        raise bad_request(f"messages: {error}", "messages") from None


def _completion_requests(body: CompletionRequest, service: Service) -> list[Request]:
    """One for each prompt; a text begins a document, token ids are taken as they are."""
    _check_model(body.model, service)
    bos, encode = service.tokenizer.bos_id, service.tokenizer.encode
    prompts = [[bos, *encode(p)] if isinstance(p, str) else p for p in body.prompts]
    for ids in prompts:
        if len(ids) >= service.context:
            raise bad_request(
                f"prompt: of {len(ids)} tokens, where {service.context} are all that this model "
                "can hold, its answer included",
                "prompt",
                "context_length_exceeded",
            )
    wanted = body.max_tokens or _default_tokens(service)
    return [
        Request(
            ids,
            max_new_tokens=min(wanted, service.context - len(ids)),
            sampling=_sampling(body, service),
            n=body.n or 1,
            stop_ids=stop_ids(service.tokenizer, chat=service.prompt_format == "chat"),
            top_logprobs=body.logprobs or 0,
        )
        for ids in prompts
    ]


def _default_tokens(service: Service) -> int:
    return min(MAX_TOKENS, service.config.max_new_tokens)


def _as_conversation(message: Message) -> Mapping[str, Any]:
    """As Tokenizer.render_conversation takes it: only the assistant's content may be in parts."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    if role == "assistant":
        return {"role": role, "content": [part.model_dump() for part in message.content]}
    return {"role": role, "content": "\n".join(message.texts)}


def _sampling(body: Generate, service: Service) -> SamplingParams:
    chosen: dict[str, Any] = {
        "temperature": min(TEMPERATURE, service.config.max_temperature),
        "top_k": min(TOP_K, service.config.max_top_k),
        "seed": secrets.randbits(63),
    }
    given = {setting.name: getattr(body, setting.name) for setting in fields(SamplingParams)}
    chosen |= {name: value for name, value in given.items() if value is not None}
    try:
        return SamplingParams(**chosen)
    except ValueError as error:
        raise bad_request(str(error)) from None


# --- answers --------------------------------------------------------------------------------------


def _envelope(service: Service, prefix: str, kind: str) -> Json:
    """The fields that every object of one reply begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_id,
    }


async def _chat_answer(generation: Generation, body: ChatRequest, dropped: int) -> Json:
    """The whole answer as one object."""
    choices = []
    for index, pieces, finish in await generation.whole():
        parts = parts_of(pieces)
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        logprobs = _chat_logprobs(generation.service.tokenizer, pieces) if body.logprobs else None
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}
        choices.append(choice)
    envelope = _envelope(generation.service, "chatcmpl", "chat.completion")
    usage = generation.usage()
    return {**envelope, "choices": choices, "usage": usage, "dropped_messages": dropped}


async def _chat_events(
    generation: Generation, body: ChatRequest, dropped: int
) -> AsyncIterator[Json]:
    """The answer as chunks: roles, text as it comes, why each choice ended, and the usage."""
    envelope = _envelope(generation.service, "chatcmpl", "chat.completion.chunk")
    # Where a usage is to come, every other chunk says that it has none.
    no_usage: Json = {"usage": None} if body.wants_usage else {}

    def chunk(
        index: int, delta: Json, logprobs: Json | None = None, end: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        return {**envelope, "choices": [choice], **no_usage}

    for index in range(len(generation.choices)):
        first = chunk(index, {"role": "assistant", "content": ""})
        yield first | ({"dropped_messages": dropped} if index == 0 else {})
    async for index, pieces, finish in generation.updates():
        for piece in pieces:
            delta: Json = {"content": piece.text}
            if piece.type != "text":
                delta = {"content": "", "part": {"type": piece.type, "text": piece.text}}
            logprobs = None
            if body.logprobs:
                logprobs = _chat_logprobs(generation.service.tokenizer, [piece])
            if piece.text or logprobs:
                yield chunk(index, delta, logprobs)
        if finish:
            yield chunk(index, {}, end=finish)
    if body.wants_usage:
        yield {**envelope, "choices": [], "usage": generation.usage()}


async def _completion_answer(generation: Generation, body: CompletionRequest) -> Json:
    """All texts as one object."""
    choices = [_completion_choice(generation, body, update) for update in await generation.whole()]
    envelope = _envelope(generation.service, "cmpl", "text_completion")
    return {**envelope, "choices": choices, "usage": generation.usage()}


async def _completion_events(
    generation: Generation, body: CompletionRequest
) -> AsyncIterator[Json]:
    """The texts as chunks of the same shape."""
    envelope = _envelope(generation.service, "cmpl", "text_completion")
    no_usage: Json = {"usage": None} if body.wants_usage else {}
    async for update in generation.updates():
        yield {**envelope, "choices": [_completion_choice(generation, body, update)], **no_usage}
    if body.wants_usage:
        yield {**envelope, "choices": [], "usage": generation.usage()}


def _completion_choice(generation: Generation, body: CompletionRequest, update: Update) -> Json:
    index, pieces, finish = update
    text = "".join(piece.text for piece in pieces)
    logprobs = None
    if body.logprobs is not None:
        logprobs = _completion_logprobs(generation.service.tokenizer, pieces, body.logprobs)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


# --- probabilities of tokens, in the two shapes that OpenAI's endpoints have for them -------------


def _chat_logprobs(tokenizer: Tokenizer, pieces: Iterable[TextPiece]) -> Json:
    """choices[].logprobs of a chat: an entry for each token that the model generated.

    `text_offset` counts the characters (code points) of the answer before the token, in the texts
    of all its parts. Tokens that share a character have its offset, but for the one that begins
    before it.
    """
    content = []
    for placed in _generated(pieces):
        _, id, _, logprob, top_logprobs = placed.token
        entry = _token_entry(tokenizer, id, logprob) | {"text_offset": placed.offset}
        tops = [_token_entry(tokenizer, *top) for top in top_logprobs]
        content.append(entry | {"top_logprobs": tops})
    return {"content": content, "refusal": None}


def _completion_logprobs(
    tokenizer: Tokenizer, pieces: Iterable[TextPiece], top_logprobs: int
) -> Json:
    """choices[].logprobs of a completion: four lists of equal length."""
    tokens = list(_generated(pieces))
    tops = [
        {_name(tokenizer, id): _finite(logprob) for id, logprob in placed.token.top_logprobs}
        for placed in tokens
    ]
    return {
        "tokens": [_name(tokenizer, placed.token.id) for placed in tokens],
        "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
        "top_logprobs": tops if top_logprobs else None,
        "text_offset": [placed.offset for placed in tokens],
    }


def _generated(pieces: Iterable[TextPiece]) -> Iterable[PlacedToken]:
    """The tokens that the model chose, without the answers of tools."""
    return (placed for piece in pieces for placed in piece.tokens if not placed.token.forced)


def _token_entry(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    # A special token stands for no bytes of the text.
    data = tokenizer.ranks[token] if token < len(tokenizer.ranks) else b""
    return {"token": tokenizer.decode([token]), "logprob": _finite(logprob), "bytes": list(data)}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; where it is no text, its bytes as OpenAI writes them: names must differ."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
