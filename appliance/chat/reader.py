"""Reading text that arrives in pieces, as coroutines: a step that needs more text yields until there is more, or an end.

Invariant: what is read does not depend on how the text was cut. One reader belongs to one answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]
"""Yields when it needs more text; returns what it read."""

SPACE = " \t\r\n"
_CLOSING = {"{": "}", "[": "]"}


class Unexpected(Exception):
    """The text is not what it would have to be here."""


class Reader:
    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """Everything before has been read."""
        self.closed = False
        """Nothing more comes."""

    def feed(self, text: str) -> None:
        self.text += text

    def peek(self) -> Step[str]:
        """The next character; empty at the end."""
        while self.at == len(self.text) and not self.closed:
            yield
        return self.text[self.at : self.at + 1]

    def accept(self, literal: str) -> Step[bool]:
        """Read `literal` if it comes next."""
        while not self.closed and literal.startswith(self.text[self.at :]) and len(self.text) - self.at < len(literal):
            yield
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def expect(self, literal: str) -> Step[None]:
        if not (yield from self.accept(literal)):
            raise Unexpected

    def space(self) -> Step[None]:
        while (character := (yield from self.peek())) and character in SPACE:
            self.at += 1

    def until(self, end: str) -> Step[str]:
        """The text before `end`, which is read too."""
        looked = self.at
        while (found := self.text.find(end, looked)) < 0:
            if self.closed:
                raise Unexpected
            looked = max(self.at, len(self.text) - len(end) + 1)
            yield
        text, self.at = self.text[self.at : found], found + len(end)
        return text

    def find(self, markers: Collection[str], sink: Callable[[str], None], *, trim: bool) -> Step[str | None]:
        """Pass on what comes before the first marker, less the space right before it; None at the end.

        The marker is not read, nor is the space before it. `trim`: nor is space at the end passed on.
        """
        held = 0  # characters of space from self.at on, not looked at again: an answer may be nothing but space
        while True:
            places = [(at, marker) for marker in markers if (at := self.text.find(marker, self.at + held)) >= 0]
            free = min(places)[0] if places else len(self.text) if self.closed else self._undecided(markers)
            end = free
            if places or trim or not self.closed:
                while free > self.at + held and self.text[free - 1] in SPACE:
                    free -= 1
                free = self.at if free <= self.at + held else free
            sink(self.text[self.at : free])
            held = end - free
            self.at = free
            self._forget()
            if places or self.closed:
                return min(places)[1] if places else None
            yield

    def rest(self, sink: Callable[[str], None]) -> Step[None]:
        """Pass on everything to the end."""
        while (yield from self.peek()):
            sink(self.text[self.at :])
            self.at = len(self.text)
            self._forget()

    def value(self, sink: Callable[[str], None] = lambda piece: None) -> Step[str]:
        """A JSON value as it stands; `sink` gets it in pieces, as they come. Brackets are matched, no more is checked."""
        start = sent = self.at
        closing: list[str] = []
        quoted = escaped = False
        while True:
            if self.at == len(self.text):
                sink(self.text[sent : self.at])
                sent = self.at
                if self.closed:
                    raise Unexpected
                yield
                continue
            character = self.text[self.at]
            if quoted:
                quoted = escaped or character != '"'
                escaped = not escaped and character == "\\"
            elif character in _CLOSING:
                closing.append(_CLOSING[character])
            elif character in "}]":
                if not closing:
                    break  # after a number or a word
                if closing.pop() != character:
                    sink(self.text[sent : self.at])
                    raise Unexpected
            elif character == '"':
                quoted = True
            elif not closing and character in ",:" + SPACE:
                break
            self.at += 1
            if not closing and not quoted and character in '"}]':
                break
        sink(self.text[sent : self.at])
        return self.text[start : self.at]

    def string(self) -> Step[str]:
        """A JSON string, decoded."""
        if (yield from self.peek()) != '"':
            raise Unexpected
        try:
            return str(json.loads((yield from self.value())))
        except ValueError:
            raise Unexpected from None

    def _forget(self) -> None:
        self.text, self.at = self.text[self.at :], 0

    def _undecided(self, markers: Collection[str]) -> int:
        """Where the longest end of the text starts that may be the beginning of a marker."""
        longest = max(map(len, markers))
        for at in range(max(self.at, len(self.text) - longest + 1), len(self.text)):
            if any(marker.startswith(self.text[at:]) for marker in markers):
                return at
        return len(self.text)
