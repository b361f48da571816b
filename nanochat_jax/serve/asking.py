"""From a request of the API to what the scheduler is asked: prompts, sampling, room for answers."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from nanochat_jax.engine.requests import Request
from nanochat_jax.engine.sampling import Sampling
from nanochat_jax.serve.conversation import TooLong, chat_prompt, stop_ids
from nanochat_jax.serve.errors import ApiError, bad_request
from nanochat_jax.serve.schema import ChatRequest, CompletionRequest, Generate, Message
from nanochat_jax.serve.service import Service

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
        prompt = chat_prompt(service.tokenizer, service.stage, messages, room)
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
        stop_ids=stop_ids(service.tokenizer, service.stage),
        alternatives=alternatives,
        use_tools=service.stage == "chat" and isinstance(asked, ChatRequest),
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
