"""Tool calls in an answer's text, found while it is written.

Text before and between calls is passed on as it comes. A call is announced when its name is known and its arguments
begin; then their JSON is passed on as the model writes it. What begins like a call and is none stays text; a call that
breaks off after it was announced ends as not well formed. Invariant: text and arguments do not depend on how the answer
was cut into pieces. One parser belongs to one answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from appliance.chat.forms import FORMS, Form
from appliance.chat.found import CallArguments, CallEnded, CallEvent, CallStarted, Gathered, Recorder, Said
from appliance.chat.reader import Step, Unexpected
from appliance.chat.tools import Tool, ToolFormat

__all__ = ["CallArguments", "CallEnded", "CallEvent", "CallParser", "CallStarted", "Gathered", "Said"]


class CallParser:
    """`feed` pieces of the answer, then `finish`; both return what they bring to light."""

    def __init__(self, form: ToolFormat, tools: Iterable[Tool], *, parallel: bool = True) -> None:
        """Calls after the first are dropped if not `parallel`."""
        self._form = FORMS[form]
        self._found = Recorder(tools, parallel=parallel)
        self._steps = self._answer(self._form)

    @property
    def calls(self) -> int:
        """Announced so far."""
        return self._found.calls

    def feed(self, text: str) -> list[CallEvent]:
        self._found.reader.feed(text)
        return self._advance()

    def finish(self) -> list[CallEvent]:
        self._found.reader.closed = True
        return self._advance()

    def _advance(self) -> list[CallEvent]:
        next(self._steps, None)
        events, self._found.events = self._found.events, []
        return events

    def _answer(self, form: Form) -> Step[None]:
        found, reader = self._found, self._found.reader
        while form.anywhere or (yield from self._begins()):
            opening = yield from reader.find(form.openings, found.say, trim=found.calls > 0)
            if opening is None:
                return
            if not (yield from self._call(opening)) and not form.anywhere:
                break
        yield from reader.rest(found.say)

    def _call(self, opening: str) -> Step[bool]:
        """Whether what this opening begins is a call, or several."""
        found, reader = self._found, self._found.reader
        mark = reader.at
        yield from reader.space()
        inside = reader.at = reader.at + len(opening)
        found.ended_at = None
        try:
            yield from self._form.read(found, opening)
        except Unexpected:
            if found.open:
                found.end(mark)
            elif found.ended_at is None:
                reader.at = inside
                found.say(reader.text[mark:inside])
                return False
            else:
                reader.at = found.ended_at
        return True

    def _begins(self) -> Step[bool]:
        """Whether a call comes next, after space."""
        reader = self._found.reader
        start = reader.at
        yield from reader.space()
        inside = reader.at
        for opening in self._form.openings:
            if (yield from reader.accept(opening)):
                reader.at = start
                return True
        reader.at = inside if self._found.calls else start
        return False
