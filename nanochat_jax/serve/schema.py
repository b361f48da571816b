"""The requests of the API as pydantic models: types, ranges, and what is not supported.

Types are strict ("1" is no number), NaN and infinities are refused, and fields that we do not know
are ignored, as OpenAI's own servers do. A parameter of OpenAI's that would change the answer but
is not implemented is an error that names it. The limits that the operator sets come after these.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from nanochat_jax.serve.errors import UNSUPPORTED, bad_request
from nanochat_jax.serve.settings import ServeConfig

INT64 = 1 << 63

Number = Annotated[float, Field(allow_inf_nan=False)]


def _tags(**kinds: type | tuple[type, ...]) -> Discriminator:
    """Chooses the member of a union by the type of what came, so that an error speaks of it."""

    def choose(value: Any) -> str | None:
        is_a = (name for name, kind in kinds.items() if isinstance(value, kind))
        return next((f"as {name}" for name in is_a), None)

    return Discriminator(
        choose,
        custom_error_type="wrong_type",
        custom_error_message=f"Input should be {' or '.join(kinds).replace('_', ' ')}",
    )


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Part(Model):
    """A piece of a message; what is not text only occurs in the assistant's."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(Model):
    """One message of a conversation; `developer` is another name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("as a_string")] | Annotated[list[Part], Tag("as a_list_of_parts")],
        _tags(a_string=str, a_list_of_parts=list),
    ]

    @property
    def texts(self) -> list[str]:
        """The text, or that of each part."""
        content = self.content
        return [content] if isinstance(content, str) else [part.text for part in content]


class StreamOptions(Model):
    """`include_usage`: a last chunk has the number of tokens."""

    include_usage: bool | None = None


Stop = Annotated[
    Annotated[str, Field(min_length=1, max_length=200), Tag("as a_string")]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(max_length=4),
        Tag("as a_list_of_at_most_4_strings"),
    ],
    _tags(a_string=str, a_list_of_at_most_4_strings=list),
]


class Generate(Model):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_unsupported(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, harmless in HARMLESS_VALUES.items():
                if value.get(name) is not None and value[name] not in harmless:
                    message = "{name} is not supported by this server; leave it out"
                    raise PydanticCustomError(UNSUPPORTED, message, {"name": name})
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return "as a string" if isinstance(value, str) else None
    of = type(value[0]) if value else str
    return {str: "as strings", int: "as ids", list: "as lists of ids"}.get(of)


class CompletionRequest(Generate):
    """POST /v1/completions: the continuation of a text, or of token ids."""

    prompt: Annotated[
        Annotated[str, Tag("as a string")]
        | Annotated[list[str], Field(min_length=1), Tag("as strings")]
        | Annotated[TokenIds, Tag("as ids")]
        | Annotated[list[TokenIds], Tag("as lists of ids")],
        Discriminator(
            _prompt_kind,
            custom_error_type="wrong_type",
            custom_error_message="Input should be a string, a list of strings, or token ids",
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompt or prompts as a list."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_one else self.prompt)


# Parameters of OpenAI's that are errors, and which of their values ask for nothing.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": ([], ["text"]),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


# --- the limits that the operator sets, checked after types and ranges ----------------------------

# Parameters, and the setting that is the highest value they may have.
HIGHEST = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "max_temperature",
    "top_k": "max_top_k",
    "n": "max_n",
}


def check_chat(request: ChatRequest, config: ServeConfig) -> None:
    """ApiError 400 that names the first parameter beyond its limit."""
    _check_most("messages", len(request.messages), config.max_messages, " messages")
    for index, message in enumerate(request.messages):
        # An answer may be longer than a question, and comes back with the next one.
        if message.role != "assistant":
            param, length = f"messages[{index}].content", sum(map(len, message.texts))
            _check_most(param, length, config.max_message_chars, " characters")
            if any(part.type != "text" for part in message.content if isinstance(part, Part)):
                raise bad_request(f"{param}: only the assistant's may have parts of Python", param)
    length = sum(len(text) for message in request.messages for text in message.texts)
    _check_most("messages", length, config.max_chars, " characters in all")
    _check_numbers(request, config)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")


def check_completion(request: CompletionRequest, config: ServeConfig) -> None:
    """The same for a completion; token ids count as characters."""
    prompts = request.prompts
    _check_most("prompt", len(prompts), config.max_prompts, " prompts")
    _check_most("prompt", sum(map(len, prompts)), config.max_chars, " characters in all")
    _check_numbers(request, config)


def _check_numbers(request: Generate, config: ServeConfig) -> None:
    for param, setting in HIGHEST.items():
        if (value := getattr(request, param, None)) is not None:
            _check_most(param, value, getattr(config, setting))


def _check_most(param: str, value: float, most: float, unit: str = "") -> None:
    if value > most:
        # What was given is not repeated: it may be a number of a thousand digits.
        raise bad_request(f"{param}: the most that is allowed here is {most:,}{unit}", param)


def document_limits(openapi: dict[str, Any], config: ServeConfig) -> None:
    """Writes the limits into an OpenAPI document."""
    for model in (ChatRequest, CompletionRequest):
        properties = openapi["components"]["schemas"][model.__name__]["properties"]
        for param in HIGHEST.keys() & properties.keys():
            number, _null = properties[param]["anyOf"]
            number["maximum"] = getattr(config, HIGHEST[param])
