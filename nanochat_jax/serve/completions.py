"""POST /v1/completions in OpenAI's older shapes: a text goes on."""

from collections.abc import AsyncIterator, Sequence

from nanochat_jax.serve.conversation import Piece
from nanochat_jax.serve.generation import Generation
from nanochat_jax.serve.logprobs import completion_logprobs
from nanochat_jax.serve.reply import Envelope, Json, check_finish, whole_answer
from nanochat_jax.serve.schema import CompletionRequest
from nanochat_jax.serve.service import Service


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
    pieces: Sequence[Piece],
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
