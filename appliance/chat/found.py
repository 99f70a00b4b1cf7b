"""What a parser finds in an answer: text, and calls from their announcement to their end.

Invariant: a call that was announced ends, and ends before the next is announced. One recorder belongs to one answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from appliance.chat.reader import Reader, Unexpected
from appliance.chat.tools import TOOL_NAME, Tool, ToolCall


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class CallStarted:
    index: int
    """From 0, in the order of the answer."""
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments' JSON."""

    index: int
    fragment: str


@dataclass(frozen=True)
class CallEnded:
    index: int
    well_formed: bool
    raw: str
    """The whole call as the model wrote it."""


CallEvent = Said | CallStarted | CallArguments | CallEnded


@dataclass
class Gathered:
    """A whole answer. A call that is not well formed is text here."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    _name: str = ""
    _arguments: list[str] = field(default_factory=list)

    def add(self, events: Iterable[CallEvent]) -> None:
        for event in events:
            if isinstance(event, Said):
                self.text += event.text
            elif isinstance(event, CallStarted):
                self._name, self._arguments = event.name, []
            elif isinstance(event, CallArguments):
                self._arguments.append(event.fragment)
            elif event.well_formed:
                self.calls.append(ToolCall(self._name, "".join(self._arguments)))
            else:
                self.text += event.raw


class Recorder:
    """The reader of one answer, and the events made of what it reads. The forms of `forms.py` drive it."""

    def __init__(self, tools: Iterable[Tool], *, parallel: bool) -> None:
        self.reader = Reader()
        self.tools = {tool.name: tool for tool in tools}
        self.events: list[CallEvent] = []
        self.calls = 0
        """Announced so far."""
        self.open = False
        """A call is announced and has not ended."""
        self.ended_at: int | None = None
        """Where the last call ended in the reader's text; None if none has since the last opening."""
        self._parallel = parallel
        self._complete = self._muted = False

    def say(self, text: str) -> None:
        if text:
            self.events.append(Said(text))

    def start(self, name: str) -> None:
        if not TOOL_NAME.fullmatch(name):
            raise Unexpected
        self.open, self._complete = True, False
        self._muted = self.calls > 0 and not self._parallel
        if not self._muted:
            self.events.append(CallStarted(self.calls, name))
            self.calls += 1

    def argue(self, fragment: str) -> None:
        if fragment and not self._muted:
            self.events.append(CallArguments(self.calls - 1, fragment))

    def complete(self) -> None:
        """The announced call has all its arguments: whatever follows, it is well formed."""
        self._complete = True

    def end(self, mark: int) -> None:
        """The announced call, written from `mark` on, is over."""
        if not self._muted:
            raw = self.reader.text[mark : self.reader.at]
            self.events.append(CallEnded(self.calls - 1, self._complete, raw))
        self.open, self.ended_at = False, self.reader.at
