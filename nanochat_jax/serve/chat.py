"""POST /v1/chat/completions in OpenAI's shapes, with parts for what the model calculated."""

from collections.abc import AsyncIterator, Sequence

from nanochat_jax.serve.conversation import Piece
from nanochat_jax.serve.generation import Generation
from nanochat_jax.serve.logprobs import chat_logprobs
from nanochat_jax.serve.reply import Envelope, Json, check_finish, whole_answer
from nanochat_jax.serve.schema import ChatRequest
from nanochat_jax.serve.service import Service


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


def _message(pieces: Sequence[Piece]) -> Json:
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


def _delta(piece: Piece) -> Json:
    if piece.type == "text":
        return {"content": piece.text}
    return {"content": "", "part": {"type": piece.type, "text": piece.text}}
