"""POST /v1/kv/prefetch: a tenant has what it will ask about brought up. The answer is `control.PrefetchProgress`.

A prompt is given as the chat or the completion that will ask about it, or by the name of a session. Immutable; any thread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from appliance.api.chat_fields import Message
from appliance.api.fields import prompts
from appliance.api.openai import MAX_MESSAGES, ChatRequest
from appliance.types import Tokens


def _prompt(value: object) -> str | Tokens | None:
    if value is None:
        return None
    found = prompts(value)
    if len(found) != 1:
        raise ValueError("should be one prompt")
    return found[0]


class PrefetchCall(ChatRequest):
    """A chat request as it will be sent, or `prompt` of a completion, or only `prompt_cache_key`: the next turn of that
    session. What says how to answer is ignored."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] = Field(default_factory=list)
    prompt: Annotated[str | Tokens | None, PlainValidator(_prompt)] = None
    to: Literal["dram", "hbm"] = "dram"
    compute: bool = False
    """Also compute what no tier has."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Any:
        if self.messages and self.prompt is not None:
            raise ValueError("give either messages or prompt")
        if not self.messages and self.prompt is None and not self.prompt_cache_key:
            raise ValueError("give messages, prompt or prompt_cache_key")
        return self
