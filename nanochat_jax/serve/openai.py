"""From a request of the API to what the scheduler is asked: prompts, sampling, room for answers."""

import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from nanochat_jax.engine.requests import Request
from nanochat_jax.engine.sampling import Sampling
from nanochat_jax.serve.errors import ApiError, bad_request
from nanochat_jax.serve.schema import ChatRequest, CompletionRequest, Generate, Message
from nanochat_jax.serve.service import Service
from nanochat_jax.serve.stream import Envelope, Generation, Json, check_finish, whole_answer
from nanochat_jax.serve.text import PlacedToken, TextPiece, TooLong, chat_prompt, stop_ids
from nanochat_jax.tokenizer import Tokenizer

TEMPERATURE, TOP_K, MAX_TOKENS = 0.8, 50, 512  # where a request does not say


class ChatJob(NamedTuple):
    """What to generate, and how many of the oldest messages the model does not see."""

    request: Request
    dropped: int


def chat_job(asked: ChatRequest, service: Service) -> ChatJob:
    """ApiError for another model's name, for no conversation, and for one too long."""
    _check_model(asked.model, service)
    wanted = asked.max_completion_tokens or asked.max_tokens or default_tokens(service)
    room = service.context - min(wanted, service.context // 4)
    messages = [_as_conversation(message) for message in asked.messages]
    try:
        prompt = chat_prompt(service.tokenizer, service.prompt_format, messages, room)
    except TooLong as error:
        raise bad_request(str(error), "messages", "context_length_exceeded") from None
    except ValueError as error:
        raise bad_request(f"messages: {error}", "messages") from None
    top = (asked.top_logprobs or 0) if asked.logprobs else 0
    request = _request(asked, service, prompt.ids, wanted, alternatives=top)
    return ChatJob(request, prompt.dropped)


def completion_jobs(asked: CompletionRequest, service: Service) -> list[Request]:
    """One for each prompt; a text begins a document, token ids are taken as they are."""
    _check_model(asked.model, service)
    bos, encode = service.tokenizer.bos_id, service.tokenizer.encode
    requests = []
    for prompt in asked.prompts:
        ids = [bos, *encode(prompt)] if isinstance(prompt, str) else prompt
        if len(ids) >= service.context:
            raise bad_request(
                f"prompt: of {len(ids)} tokens, where {service.context} are all that this model "
                "can hold, its answer included",
                "prompt",
                "context_length_exceeded",
            )
        wanted = asked.max_tokens or default_tokens(service)
        requests.append(_request(asked, service, ids, wanted, alternatives=asked.logprobs or 0))
    return requests


def default_tokens(service: Service) -> int:
    return min(MAX_TOKENS, service.config.max_new_tokens)


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.model_id:
        raise model_not_found(name[:100], service)


def model_not_found(name: str, service: Service) -> ApiError:
    message = f"there is no model {name!r} here, only {service.model_id!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def _as_conversation(message: Message) -> Mapping[str, Any]:
    """As Tokenizer.render_conversation takes it: only the assistant's content may be in parts."""
    role = "system" if message.role == "developer" else message.role
    content: str | list[dict[str, str]]
    if isinstance(message.content, str):
        content = message.content
    elif role == "assistant":
        content = [part.model_dump() for part in message.content]
    else:
        content = "\n".join(part.text for part in message.content)
    return {"role": role, "content": content}


def _request(
    asked: Generate, service: Service, prompt: Sequence[int], wanted: int, alternatives: int
) -> Request:
    return Request(
        prompt=prompt,
        max_new_tokens=min(wanted, service.context - len(prompt)),
        sampling=_sampling(asked, service),
        n=asked.n or 1,
        stop_ids=stop_ids(service.tokenizer, service.prompt_format),
        alternatives=alternatives,
        use_tools=service.prompt_format == "chat" and isinstance(asked, ChatRequest),
    )


def _sampling(asked: Generate, service: Service) -> Sampling:
    chosen: dict[str, Any] = {
        "temperature": min(TEMPERATURE, service.config.max_temperature),
        "top_k": min(TOP_K, service.config.max_top_k),
        "seed": secrets.randbits(63),
    }
    for setting in fields(Sampling):
        value = getattr(asked, setting.name)
        if value is not None:
            chosen[setting.name] = value
    try:
        return Sampling(**chosen)
    except ValueError as error:
        raise bad_request(str(error)) from None


# --- POST /v1/completions in OpenAI's older shapes: a text goes on ---


async def completion_answer(
    service: Service, generation: Generation, asked: CompletionRequest
) -> Json:
    """All texts as one object."""
    answers = await whole_answer(service, generation)
    choices = [
        _choice(service, asked, index, pieces, finish)
        for index, (pieces, finish) in enumerate(answers)
    ]
    return _envelope(service).around(choices, usage=generation.usage.as_dict())


async def completion_events(
    service: Service, generation: Generation, asked: CompletionRequest
) -> AsyncIterator[Json]:
    """The texts as chunks of the same shape."""
    envelope = _envelope(service)
    no_usage: Json = {"usage": None} if asked.wants_usage else {}
    async for update in generation.updates():
        check_finish(update.finish, service)
        choice = _choice(service, asked, update.choice, update.pieces, update.finish)
        yield envelope.around([choice], **no_usage)
    if asked.wants_usage:
        yield envelope.around([], usage=generation.usage.as_dict())


def _envelope(service: Service) -> Envelope:
    return Envelope("cmpl", "text_completion", service.model_id)


def _choice(
    service: Service,
    asked: CompletionRequest,
    index: int,
    pieces: Sequence[TextPiece],
    finish: str | None,
) -> Json:
    wanted = asked.logprobs
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": None
        if wanted is None
        else completion_logprobs(service.tokenizer, pieces, wanted),
        "finish_reason": finish,
    }


# --- POST /v1/chat/completions in OpenAI's shapes, with parts for what the model calc ---


def chat_envelope(service: Service) -> Envelope:
    return Envelope("chatcmpl", "chat.completion", service.model_id)


async def chat_answer(
    service: Service, generation: Generation, asked: ChatRequest, dropped: int
) -> Json:
    """The whole answer as one object."""
    choices = [
        {
            "index": index,
            "message": _message(pieces),
            "logprobs": chat_logprobs(service.tokenizer, pieces) if asked.logprobs else None,
            "finish_reason": finish,
        }
        for index, (pieces, finish) in enumerate(await whole_answer(service, generation))
    ]
    return chat_envelope(service).around(
        choices, usage=generation.usage.as_dict(), dropped_messages=dropped
    )


def _message(pieces: Sequence[TextPiece]) -> Json:
    parts: list[dict[str, str]] = []
    for piece in pieces:
        if parts and parts[-1]["type"] == piece.type:
            parts[-1]["text"] += piece.text
        elif piece.text:
            parts.append({"type": piece.type, "text": piece.text})
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    used_tools = any(part["type"] != "text" for part in parts)
    message = {"role": "assistant", "content": text, "refusal": None}
    return message | ({"parts": parts} if used_tools else {})


async def chat_events(
    service: Service, generation: Generation, asked: ChatRequest, dropped: int
) -> AsyncIterator[Json]:
    """The answer as chunks: roles, text as it comes, why each choice ended, and the usage."""
    envelope = chat_envelope(service)
    # Where a usage is to come, every other chunk says that it has none.
    no_usage: Json = {"usage": None} if asked.wants_usage else {}

    def chunk(choice: int, delta: Json, logprobs: Json | None = None, **end: str) -> Json:
        told = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return envelope.around([told | end], ".chunk", **no_usage)

    for index in range(generation.n_choices):
        first = chunk(index, {"role": "assistant", "content": ""})
        yield first | ({"dropped_messages": dropped} if index == 0 else {})
    async for update in generation.updates():
        check_finish(update.finish, service)
        for piece in update.pieces:
            logprobs = chat_logprobs(service.tokenizer, [piece]) if asked.logprobs else None
            if piece.text or logprobs:
                yield chunk(update.choice, _delta(piece), logprobs)
        if update.finish:
            yield chunk(update.choice, {}, finish_reason=update.finish)
    if asked.wants_usage:
        yield envelope.around([], ".chunk", usage=generation.usage.as_dict())


def _delta(piece: TextPiece) -> Json:
    if piece.type == "text":
        return {"content": piece.text}
    return {"content": "", "part": {"type": piece.type, "text": piece.text}}


# --- Probabilities of tokens in the two shapes that OpenAI's endpoints have for them ---

LEAST = -9999.0  # what OpenAI says for "impossible", since JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, pieces: Iterable[TextPiece]) -> dict[str, Any]:
    """choices[].logprobs of a chat: an entry for each token that was drawn."""
    content = [
        {
            **_entry(tokenizer, said.token.id, said.token.logprob),
            "top_logprobs": [_entry(tokenizer, *top) for top in said.token.alternatives],
        }
        for said in drawn(pieces)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, pieces: Iterable[TextPiece], alternatives: int
) -> dict[str, Any]:
    """choices[].logprobs of a completion: four lists of equal length."""
    tokens = list(drawn(pieces))
    tops = [
        {_name(tokenizer, id): _finite(logprob) for id, logprob in said.token.alternatives}
        for said in tokens
    ]
    return {
        "tokens": [_name(tokenizer, said.token.id) for said in tokens],
        "token_logprobs": [_finite(said.token.logprob) for said in tokens],
        "top_logprobs": tops if alternatives else None,
        "text_offset": [said.offset for said in tokens],
    }


def drawn(pieces: Iterable[TextPiece]) -> Iterable[PlacedToken]:
    """The tokens that the model chose, without the answers of tools."""
    return (said for piece in pieces for said in piece.tokens if not said.token.forced)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    # A special token stands for no bytes of the text.
    is_text = token < len(tokenizer.ranks)
    return {
        "token": tokenizer.decode([token]),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.ranks[token]) if is_text else [],
    }


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; where it is no text, its bytes as OpenAI writes them: names must differ."""
    try:
        return tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        escaped = "".join(f"\\x{byte:02x}" for byte in tokenizer.decode_bytes([token]))
        return f"bytes:{escaped}"


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
