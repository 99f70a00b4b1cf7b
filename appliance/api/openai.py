"""Requests of the OpenAI API, checked field by field. `answers.py` has the responses.

Requests are strict about the type and range of every field they know and ignore the fields they do not, as clients send
many. What is known but cannot be honoured is refused, never silently dropped. Validators never put a value into a
message: prompts are content. Immutable values; any thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

from appliance.types import Tokens

MAX_CHOICES = 64
MAX_MESSAGES = 10_000
MAX_STOPS = 16
MAX_STOP_CHARS = 1_000
MAX_BIASES = 1_024


def _token_ids(value: object) -> Tokens:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("should be a list of token ids")
    try:
        return Tokens.of(value)
    except OverflowError:
        raise ValueError("token ids should lie between 0 and the size of the vocabulary") from None


def _prompts(value: object) -> tuple[str | Tokens, ...]:
    """One prompt or several, each text or token ids; ids become Tokens here, once."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return (_token_ids(value),)
        if kinds == {str}:
            return tuple(value)
        if kinds == {list}:
            return tuple(map(_token_ids, value))
    raise ValueError("should be a string, a list of strings, a list of token ids or a list of such lists; not empty")


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"should be a string or a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"each stop should be a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"should map at most {MAX_BIASES} token ids to a bias")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("keys should be token ids")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("biases should lie between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _joined_parts(value: object) -> object:
    """Content given as parts becomes one string; anything else is left to the field's own type."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('only parts of type "text" are supported by this model; leave images, audio and files out')
        if not isinstance(part.get("text"), str):
            raise ValueError('the "text" of a part should be a string')
        texts.append(part["text"])
    return "".join(texts)


def _only(*allowed: object, hint: str) -> AfterValidator:
    """Refuses every value but null and `allowed`."""

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"not supported: {hint}")
        return value

    return AfterValidator(check)


NoTools = Annotated[Any, _only([], hint="leave tools out and describe what you need in a message")]

NoGrammar = Annotated[Any, _only(hint="leave it out and describe the form you need in a message")]


class Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    tool_calls: NoTools = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object, info: ValidationInfo) -> object:
        said_nothing = value is None and info.data.get("role") == "assistant"
        return "" if said_nothing else _joined_parts(value)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: they have no developer role."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Request):
    include_usage: bool | None = None


class GenerationRequest(Request, ABC):
    """What both generation endpoints share. null means the default, everywhere."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=8)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases)] = ()
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=32, max_length=128)
    """Splits the cache inside a tenant: only requests with the same salt share KV."""
    prompt_cache_key: str | None = None
    user: str | None = None
    cache_prompt: bool | None = None
    response_format: Annotated[
        Any, _only({"type": "text"}, hint='leave response_format out or send {"type": "text"}')
    ] = None

    grammar: NoGrammar = None
    json_schema: NoGrammar = None

    @property
    def token_limit(self) -> int | None:
        """Completion tokens the caller asked for."""
        return self.max_tokens

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens to report besides the chosen one; None for no log-probabilities."""


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: NoTools = None
    functions: NoTools = None
    tool_choice: Annotated[Any, _only("none", "auto", hint='leave tool_choice out or send "none"')] = None
    function_call: Annotated[Any, _only("none", hint='leave function_call out or send "none"')] = None
    modalities: Annotated[Any, _only(["text"], hint='leave modalities out or send ["text"]')] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Annotated[tuple[str | Tokens, ...], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Annotated[bool | None, _only(False, hint="leave echo out and prepend the prompt yourself")] = None
    suffix: Annotated[str | None, _only("", hint="leave suffix out")] = None
    best_of: Annotated[int | None, _only(1, hint="leave best_of out and choose among n completions yourself")] = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Request):
    content: str
    add_special: bool = False
    parse_special: bool = True
    """Whether the text of a special token becomes that token, as in a completion's prompt."""


class DetokenizeRequest(Request):
    tokens: Annotated[Tokens, PlainValidator(_token_ids)]
