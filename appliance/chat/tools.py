"""Tools as every API of the appliance understands them, and how a model family writes its calls.

A chat template tells the family: it shows the model the form that the model was trained to answer in. Immutable values,
pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
"""Names that no template and no grammar can misread."""


@dataclass(frozen=True)
class Tool:
    """A function the model may ask its client to call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of the arguments, an object."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object, as the model wrote it."""


class ToolChoice(str, Enum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ToolUse:
    """What one request says about tools. Messages may hold calls and results where `tools` is empty."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice.AUTO
    name: str | None = None
    """With REQUIRED: the one tool to call."""
    parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def callable(self) -> bool:
        """Whether an answer can hold calls at all."""
        return bool(self.tools) and self.choice is not ToolChoice.NONE


class ToolFormat(str, Enum):
    """How a call is written."""

    HERMES = "hermes"
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>"""
    XML = "xml"
    """<tool_call><function=f><parameter=key>value</parameter></function></tool_call>"""
    FUNCTION = "function"
    """<function=f>{...}</function>"""
    LLAMA = "llama"
    """{"name": "f", "parameters": {...}} as the whole answer"""
    MISTRAL = "mistral"
    """[TOOL_CALLS][{"name": "f", "arguments": {...}}] or [TOOL_CALLS]f[ARGS]{...}"""
    DEEPSEEK = "deepseek"
    """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"""

    def __str__(self) -> str:
        return self.value


DEEPSEEK_BEGIN, DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DEEPSEEK_CALL, DEEPSEEK_SEP, DEEPSEEK_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
PYTHON_TAG = "<|python_tag|>"

_SIGNS = (
    (ToolFormat.DEEPSEEK, (DEEPSEEK_CALL,)),
    (ToolFormat.MISTRAL, ("[TOOL_CALLS]",)),
    (ToolFormat.XML, ("<function=", "<parameter=")),
    (ToolFormat.FUNCTION, ("<function=",)),
    (ToolFormat.HERMES, ("<tool_call>",)),
    (ToolFormat.LLAMA, ("ipython",)),
)
"""What only the templates of a family hold, the most telling first."""

MARKERS = frozenset(
    {
        DEEPSEEK_BEGIN,
        DEEPSEEK_END,
        DEEPSEEK_CALL,
        DEEPSEEK_SEP,
        DEEPSEEK_CALL_END,
        PYTHON_TAG,
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<tool_call>",
        "</tool_call>",
    }
)
"""Special tokens whose text is part of an answer: without it a call could not be told from prose."""


def detect(template: str) -> ToolFormat | None:
    """The family of a chat template's source; None if it is not known."""
    return next((family for family, signs in _SIGNS if all(sign in template for sign in signs)), None)
