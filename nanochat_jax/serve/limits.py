"""The limits of a request that the operator sets, checked after its types and ranges."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from nanochat_jax.serve.errors import bad_request
from nanochat_jax.serve.schema import ChatRequest, CompletionRequest, Generate, Message
from nanochat_jax.serve.settings import ServeConfig

# Parameters, and the setting that is the highest value they may have.
HIGHEST = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "max_temperature",
    "top_k": "max_top_k",
    "n": "max_n",
}


class Amount(NamedTuple):
    """So much of something, and how much there may be."""

    param: str
    value: float
    most: float
    unit: str = ""


def check_chat(request: ChatRequest, config: ServeConfig) -> None:
    """ApiError 400 that names the first parameter beyond its limit."""
    lengths = [sum(map(len, _texts(message))) for message in request.messages]
    # An answer may be longer than a question, and comes back with the next one.
    asked = [i for i, message in enumerate(request.messages) if message.role != "assistant"]
    _refuse(
        Amount("messages", len(lengths), config.max_messages, " messages"),
        *(
            Amount(f"messages[{i}].content", lengths[i], config.max_message_chars, " characters")
            for i in asked
        ),
        Amount("messages", sum(lengths), config.max_chars, " characters in all"),
        *_highest(request, config),
    )
    _check_parts(request)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")


def check_completion(request: CompletionRequest, config: ServeConfig) -> None:
    """The same for a completion; token ids count as characters."""
    prompts = request.prompts
    _refuse(
        Amount("prompt", len(prompts), config.max_prompts, " prompts"),
        Amount("prompt", sum(map(len, prompts)), config.max_chars, " characters in all"),
        *_highest(request, config),
    )


def document_limits(openapi: dict[str, Any], config: ServeConfig) -> None:
    """Writes the limits into an OpenAPI document."""
    for model in (ChatRequest, CompletionRequest):
        properties = openapi["components"]["schemas"][model.__name__]["properties"]
        for param in HIGHEST.keys() & properties.keys():
            number, _null = properties[param]["anyOf"]
            number["maximum"] = getattr(config, HIGHEST[param])


def _highest(request: Generate, config: ServeConfig) -> Iterator[Amount]:
    for param, setting in HIGHEST.items():
        value = getattr(request, param, None)
        if value is not None:
            yield Amount(param, value, getattr(config, setting))


def _refuse(*amounts: Amount) -> None:
    for param, value, most, unit in amounts:
        if value > most:
            # What was given is not repeated: it may be a number of a thousand digits.
            raise bad_request(f"{param}: the most that is allowed here is {most:,}{unit}", param)


def _texts(message: Message) -> list[str]:
    content = message.content
    return [content] if isinstance(content, str) else [part.text for part in content]


def _check_parts(request: ChatRequest) -> None:
    for index, message in enumerate(request.messages):
        parts = [] if isinstance(message.content, str) else message.content
        if message.role != "assistant" and any(part.type != "text" for part in parts):
            param = f"messages[{index}].content"
            raise bad_request(f"{param}: only the assistant's may have parts of Python", param)
