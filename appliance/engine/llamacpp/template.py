"""A model's chat template, rendered in a sandbox.

Invariant: special-token strings inside messages come out marked as plain text. Only such strings (and a message's
end that could become one by joining what follows) are swapped for a placeholder while the template runs, so
a template sees every other text exactly as it was sent. Threading: any thread.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.engine.llamacpp.tool_template import RENDERING_ERRORS, ToolTemplate
from appliance.errors import ModelError, RequestError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used when a model brings no template: what most instruction-tuned models were shown in one form or another."""


class ChatTemplate:
    def __init__(self, source: str | None, *, bos: str, eos: str, special: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], keep_trailing_newline=True
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now, bos_token=bos, eos_token=eos)
        try:
            self._template = environment.from_string(source or CHATML)
        except TemplateError as error:
            raise ModelError(f"the model's chat template is not valid: {error}") from None
        self._special = _matcher(special)
        self.tools = ToolTemplate.of(source or CHATML, environment, self._rendered)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[tuple[str, bool]]:
        """(text, literal) in order; literal text may hold special tokens, the rest is plain. RequestError if refused.

        `options` are what this template knows besides: "enable_thinking" and the like.
        """
        guard = _Guard(self._special)
        try:
            messages, tools = self.tools.conversation(messages, tools or ())
            rendered = self._rendered(guard.hide(messages), guard.hide(tools), guard.hide(dict(options)))
        except TemplateError as error:
            reason = str(error) if isinstance(error, _Refused) else "they lack what it expects"
            raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from None
        except RENDERING_ERRORS:
            message = "the chat template cannot render these messages: check roles, content and tools"
            raise RequestError(message, param="messages") from None
        return guard.reveal(rendered)

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        return self._template.render(
            {**options, "messages": messages, "tools": tools or None, "add_generation_prompt": True}
        )


class _Guard:
    """Swaps dangerous strings for placeholders, and finds them again in the rendered text."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._special = special
        self._mark = f"kv{secrets.token_hex(8)}x"
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(self._swap, value) if self._special else value
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def reveal(self, rendered: str) -> Iterator[tuple[str, bool]]:
        for index, text in enumerate(re.split(f"{self._mark}(\\d+)e", rendered)):
            if index % 2:
                yield self._hidden[int(text)], False
            elif text:
                yield text, True

    def _swap(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}{len(self._hidden) - 1}e"


class _Refused(TemplateError):
    """The template itself called raise_exception."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_other: Any) -> str:
    """Plain JSON, not HTML-safe: jinja's own filter would escape what the model must see."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _matcher(special: Sequence[str]) -> re.Pattern[str] | None:
    """Any special string; at the end of a text also the beginning of one, which the next text could complete."""
    if not special:
        return None
    longest_first = sorted(set(special), key=len, reverse=True)
    beginnings = {text[:cut] for text in longest_first for cut in range(1, len(text))}
    whole = "|".join(map(re.escape, longest_first))
    partial = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
    return re.compile(f"{whole}|(?:{partial})\\Z") if partial else re.compile(whole)
