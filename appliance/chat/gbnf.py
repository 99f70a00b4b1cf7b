"""Grammars in llama.cpp's notation (GBNF), read before the engine sees them.

llama.cpp prints the grammars it cannot read, recurses as deep as they are nested, and needs time exponential in how many
things in a row can be empty. Invariant: what `check` lets pass, llama.cpp reads, in bounded time and stack. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_CHARS = 64 * 1024
MAX_DEPTH = 100
"""Of groups in groups and of rules that begin with rules."""
MAX_RULES = 4_000
MAX_REPEATS = 1_000
MAX_STARTS = 10_000
"""Ways in which a rule can begin: the engine keeps them all at once."""
MAX_SKIPPED = 256
"""Things in a row that can be empty."""

_SPACE = re.compile(r"(?:[ \t]|#[^\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9-]+")
_ESCAPE = r"""\\(?:[tnr\\"\[\]]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U0[0-9A-Fa-f]{7})"""
_LITERAL = re.compile(rf'"(?:[^"\\\x00\n\r]|{_ESCAPE})*"')
_CLASS = re.compile(rf"\[\^?(?:[^\]\\\x00\n\r]|{_ESCAPE})+\]")
_COUNT = re.compile(r"\{[ \t]*(\d{1,9})[ \t]*(?:(,)[ \t]*(\d{1,9})?[ \t]*)?\}")
_ENDLESS = MAX_STARTS + 1


class GrammarError(Exception):
    """One line for who sent the grammar. Holds nothing of it but places and numbers."""


@dataclass
class _Item:
    names: str | None = None
    """A rule."""
    group: list[list[_Item]] | None = None
    empty: bool = False
    """An empty literal."""
    least: int = 1
    most: int | None = 1
    """None: without end."""
    rules: int = 1
    """That llama.cpp makes of it."""


@dataclass(frozen=True)
class _Start:
    """How something can begin. Numbers stop growing where they are refused."""

    ways: int
    """Characters that can come first, by the way to reach them."""
    skips: int
    """Ways to be empty."""
    row: int
    """Longest row of things looked at before one is not empty."""


def check(text: str, *, max_chars: int = MAX_CHARS) -> None:
    """GrammarError if llama.cpp could not read the grammar, or not in bounded time."""
    if len(text) > max_chars:
        raise GrammarError(f"has more than {max_chars} characters")
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise GrammarError('has no rule "root"')
    if len(rules) > MAX_RULES:
        raise GrammarError(f"has more than {MAX_RULES} rules")
    starts = _Starts(rules)
    for alternatives in rules.values():
        starts.look_at(alternatives)


@dataclass
class _Reader:
    text: str
    at: int = 0
    depth: int = 0

    def rules(self) -> dict[str, list[list[_Item]]]:
        rules: dict[str, list[list[_Item]]] = {}
        self._skip(_SPACE_AND_LINES)
        while self.at < len(self.text):
            name = self._match(_NAME, "a rule's name")[0]
            self._skip(_SPACE)
            self._literally("::=")
            self._skip(_SPACE_AND_LINES)
            if name in rules:
                raise self._wrong("a rule that was not there before")
            rules[name] = self._alternatives()
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self._wrong("the end of the line")
            self._skip(_SPACE_AND_LINES)
        return rules

    def _alternatives(self) -> list[list[_Item]]:
        found = [self._sequence()]
        while self._next() == "|":
            self.at += 1
            self._skip(_SPACE_AND_LINES)
            found.append(self._sequence())
        return found

    def _sequence(self) -> list[_Item]:
        items: list[_Item] = []
        while item := self._item():
            self._space()
            while repeated := self._repetition():
                if item.empty:
                    raise self._wrong("something to repeat before this")
                self._repeat(item, *repeated)
                self._space()
            items.append(item)
        return items

    def _item(self) -> _Item | None:
        character = self._next()
        if character == '"':
            return _Item(empty=self._match(_LITERAL, "the end of a literal")[0] == '""')
        if character == "[":
            self._match(_CLASS, "a class of characters")
            return _Item()
        if character == ".":
            self.at += 1
            return _Item()
        if character == "(":
            return self._group()
        if found := _NAME.match(self.text, self.at):
            self.at = found.end()
            return _Item(names=found[0])
        return None

    def _group(self) -> _Item:
        self.at += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise GrammarError(f"nests groups more than {MAX_DEPTH} deep")
        self._skip(_SPACE_AND_LINES)
        group = self._alternatives()
        self._literally(")")
        self.depth -= 1
        return _Item(group=group, rules=1 + sum(item.rules for sequence in group for item in sequence))

    def _repetition(self) -> tuple[int, int | None] | None:
        character = self._next()
        if character in ("*", "+", "?"):
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        if character != "{":
            return None
        found = self._match(_COUNT, "{m}, {m,} or {m,n}")
        least = int(found[1])
        most = int(found[3]) if found[3] else None if found[2] else least
        if max(least, most or 0) > MAX_REPEATS:
            raise GrammarError(f"repeats something more than {MAX_REPEATS} times")
        if most is not None and most < max(least, 1):
            raise self._wrong("a count that is not below the first, nor 0")
        return least, most

    def _repeat(self, item: _Item, least: int, most: int | None) -> None:
        inner = _Item(item.names, item.group, item.empty, item.least, item.most, item.rules)
        item.rules *= max(least, most or 1)
        if item.rules > MAX_REPEATS:
            raise GrammarError(f"repeats more than {MAX_REPEATS} parts in all at one place")
        item.names, item.group, item.empty, item.least, item.most = None, [[inner]], False, least, most

    # --- characters ----------------------------------------------------------------------------------------------

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _space(self) -> None:
        self._skip(_SPACE_AND_LINES if self.depth else _SPACE)

    def _skip(self, space: re.Pattern[str]) -> None:
        found = space.match(self.text, self.at)
        assert found
        self.at = found.end()

    def _match(self, wanted: re.Pattern[str], what: str) -> re.Match[str]:
        found = wanted.match(self.text, self.at)
        if found is None:
            raise self._wrong(what)
        self.at = found.end()
        return found

    def _literally(self, literal: str) -> None:
        if not self.text.startswith(literal, self.at):
            raise self._wrong(f'"{literal}"')
        self.at += len(literal)

    def _wrong(self, wanted: str) -> GrammarError:
        line = self.text.count("\n", 0, self.at)
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1)
        return GrammarError(f"line {line + 1}, column {column + 1}: {wanted} was expected")


@dataclass
class _Starts:
    rules: Mapping[str, list[list[_Item]]]
    _known: dict[str, _Start | None] = field(default_factory=dict)
    """None while it is being found out."""

    def of_rule(self, name: str, depth: int) -> _Start:
        if name in self._known:
            start = self._known[name]
            if start is None:
                raise GrammarError("has a rule that begins with itself")
            return start
        if name not in self.rules:
            raise GrammarError("refers to a rule that it does not have")
        if depth > MAX_DEPTH:
            raise GrammarError(f"has rules that begin with rules more than {MAX_DEPTH} deep")
        self._known[name] = None
        start = self._known[name] = self._of_any(self.rules[name], depth)
        return start

    def look_at(self, alternatives: list[list[_Item]]) -> None:
        """GrammarError if an answer can come to a place in here where too much is possible."""
        _bounded(self._of_any(alternatives, 0))
        for sequence in alternatives:
            after = _Start(0, 1, 0)
            for item in reversed(sequence):
                after = _bounded(_then(self._of_item(item, 0), after))
                if item.group is not None:
                    self.look_at(item.group)

    def _of_any(self, alternatives: list[list[_Item]], depth: int) -> _Start:
        starts = [self._of_row(sequence, depth) for sequence in alternatives]
        return _Start(
            _capped(sum(start.ways for start in starts)),
            _capped(sum(start.skips for start in starts)),
            max(start.row for start in starts),
        )

    def _of_row(self, sequence: list[_Item], depth: int) -> _Start:
        found = []
        for item in sequence:
            found.append(self._of_item(item, depth))
            if not found[-1].skips:
                break
        after = _Start(0, 1, 0)
        for start in reversed(found):
            after = _then(start, after)
        return after

    def _of_item(self, item: _Item, depth: int) -> _Start:
        if item.empty:
            return _Start(0, 1, 0)
        if item.names is not None:
            return self.of_rule(item.names, depth + 1)
        if item.group is None:
            return _Start(1, 0, 1)
        start = self._of_any(item.group, depth + 1)
        if start.skips and item.most is None:
            raise GrammarError("repeats without end something that can be empty")
        if start.skips and item.most is not None:
            return _Start(
                _capped(start.ways * item.most),
                _capped(start.skips ** min(item.most, 16)),
                _capped(start.row * item.most),
            )
        return _Start(start.ways, int(item.least == 0), start.row)


def _bounded(start: _Start) -> _Start:
    if start.ways > MAX_STARTS:
        raise GrammarError(f"can go on in more than {MAX_STARTS} ways at one place")
    if start.row > MAX_SKIPPED or start.skips > MAX_SKIPPED:
        raise GrammarError(f"has more than {MAX_SKIPPED} parts in a row that can all be empty")
    return start


def _then(first: _Start, after: _Start) -> _Start:
    if not first.skips:
        return first
    return _Start(
        _capped(first.ways + first.skips * after.ways),
        _capped(first.skips * after.skips),
        _capped(first.row + after.row),
    )


def _capped(number: int) -> int:
    return min(number, _ENDLESS)
