"""Requests of the OpenAI API, checked field by field. `answers.py` has the responses.

Requests are strict about the type and range of every field they know and ignore the fields they do not, as clients send
many. What is known but cannot be honoured is refused, never silently dropped. Validators never put a value into a
message: prompts are content. Immutable values; any thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from appliance.api.chat_fields import Message, TemplateOptions, ToolChoice, Tools
from appliance.api.constraints import Constrained
from appliance.api.fields import Request, Retention, biases, only, prompts, stops, token_ids
from appliance.types import Tokens

MAX_CHOICES = 64
MAX_MESSAGES = 10_000
MAX_INPUTS = 2_048
"""Texts of one request for embeddings."""

NoFunctions = Annotated[Any, only([], hint="use tools and tool_choice")]


class StreamOptions(Request):
    include_usage: bool | None = None


class GenerationRequest(Constrained, ABC):
    """What both generation endpoints share. null means the default, everywhere."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=8)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """vLLM's name for the same."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[tuple[str, ...], PlainValidator(stops)] = ()
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(biases)] = ()
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=32, max_length=128)
    """Splits the cache inside a tenant: only requests with the same salt share KV."""
    prompt_cache_key: str | None = Field(None, max_length=1024)
    prompt_cache_retention: Retention = None
    user: str | None = None
    cache_prompt: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """Completion tokens the caller asked for."""
        return self.max_tokens

    @property
    def retention_s(self) -> float | None:
        return self.prompt_cache_retention

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens to report besides the chosen one; None for no log-probabilities."""


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions = Field(default_factory=dict)
    """What the model's own template knows: enable_thinking and the like."""
    reasoning_effort: str | None = Field(None, max_length=16)
    chat_template: Annotated[Any, only(hint="the model's own template is used")] = None
    functions: NoFunctions = None
    function_call: Annotated[Any, only("none", hint="use tools and tool_choice")] = None
    modalities: Annotated[Any, only(["text"], hint='leave modalities out or send ["text"]')] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_options(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs


class CompletionRequest(GenerationRequest):
    prompt: Annotated[tuple[str | Tokens, ...], PlainValidator(prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Annotated[bool | None, only(False, hint="leave echo out and prepend the prompt yourself")] = None
    suffix: Annotated[str | None, only("", hint="leave suffix out")] = None
    best_of: Annotated[int | None, only(1, hint="leave best_of out and choose among n completions yourself")] = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


def _inputs(value: object) -> tuple[str | Tokens, ...]:
    texts = prompts(value)
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"should hold at most {MAX_INPUTS} texts")
    return texts


class EmbeddingRequest(Request):
    input: Annotated[tuple[str | Tokens, ...], PlainValidator(_inputs)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class TokenizeRequest(Request):
    content: str
    add_special: bool = False
    parse_special: bool = True
    """Whether the text of a special token becomes that token, as in a completion's prompt."""


class DetokenizeRequest(Request):
    tokens: Annotated[Tokens, PlainValidator(token_ids)]
