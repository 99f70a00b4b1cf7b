"""Which tokens are in cells: the books against the null engine's cells and against brute force, and who goes first."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from appliance.engine.base import Row
from appliance.engine.cells import Cells
from appliance.engine.request import Request
from appliance.engine.residency import Residency, Sequence
from appliance.types import Tokens
from tests.support.engines import export, null_engine

CELLS = 8
SEQUENCES = 5
NAMESPACES = (b"one", b"two")


def spelled(letters: str) -> Tokens:
    return Tokens.of(map(ord, letters))


@cache
def rows_of(tokens: Tokens) -> bytes:
    """The KV of these tokens, computed where nothing was ever shared or dropped."""
    engine = null_engine(context_tokens=64)
    engine.decode([Row(0, 0, tokens, False)])
    return bytes(export(engine, 0, 0, [len(tokens)])[0])


class CellsMachine(RuleBasedStateMachine):
    """Requests of few letters, so that they share, cut and cover one another in every way."""

    waiting, admitted = Bundle("waiting"), Bundle("admitted")

    def __init__(self) -> None:
        super().__init__()
        self.engine = null_engine(context_tokens=CELLS, max_sequences=SEQUENCES, block_tokens=CELLS)
        self.cells = Cells(self.engine, threading.RLock())
        self.books = self.cells.residency
        self.requests: list[Request] = []

    def outstanding(self) -> int:
        return sum(request.outstanding for request in self.requests)

    @rule(
        target=waiting,
        ns=st.sampled_from(NAMESPACES),
        letters=st.builds(lambda a, b: "a" * a + "b" * b, st.integers(1, 4), st.integers(0, 1)),
        reserve_tokens=st.integers(0, 2),
    )
    def begin(self, ns: bytes, letters: str, reserve_tokens: int) -> Request:
        prompt = spelled(letters)
        source, resident = self.books.lookup(ns, prompt)
        assert resident == self.longest_shared(ns, prompt)
        pin = self.books.pin(source, min(resident, len(prompt) - 1)) if source else None
        request = Request(letters, len(self.requests), ns, ns, prompt, reserve_tokens, pin)
        self.requests.append(request)
        return request

    def longest_shared(self, ns: bytes, prompt: Tokens) -> int:
        shared = [0]
        for sequence in self.books._sequences.values():
            tokens = sequence.tokens().ids()[: sequence.offered]
            n = 0
            while n < min(len(tokens), len(prompt)) and tokens[n] == prompt.ids()[n]:
                n += 1
            shared.append(n if sequence.ns == ns else 0)
        return max(shared)

    @rule(target=admitted, request=consumes(waiting))
    def admit(self, request: Request) -> Any:
        pinned = request.pin.tokens if request.pin else 0
        before = (self.books.used, len(self.books))
        if not self.cells.admit(request, request.most_cells, self.outstanding()):
            assert (self.books.used, len(self.books)) == before
            self.drop(request)
            return multiple()
        assert request.sequence is not None
        assert request.sequence.length == pinned
        assert request.pin is None
        return request

    @rule(request=admitted, n_tokens=st.integers(1, 5), letter=st.sampled_from("ab"))
    def compute(self, request: Request, n_tokens: int, letter: str) -> None:
        """Prompt tokens first, all of them at most; then generated ones, within what was claimed."""
        sequence = request.sequence
        assert sequence
        length, prompt = sequence.length, request.prompt
        if length < len(prompt):
            row = prompt[length : length + n_tokens]
            generated = b""
        else:
            row = spelled(letter * min(n_tokens, request.most_cells - length))
            generated = row.data
        if len(row):
            self.engine.decode([Row(sequence.id, length, row, False)])  # the null engine refuses if no cell is free
            self.cells.extend(sequence, len(row), generated)

    @rule(request=admitted)
    def adopt(self, request: Request) -> None:
        sequence = request.sequence
        assert sequence
        if sequence.generated:
            return
        before = sequence.length
        self.cells.adopt(request)
        last = len(request.prompt) - 1
        assert min(before, last) <= sequence.length <= last
        assert sequence.length == min(last, self.longest_shared(request.ns, request.prompt))

    @rule(request=consumes(admitted))
    def release(self, request: Request) -> None:
        self.drop(request)

    @rule(request=consumes(waiting))
    def give_up(self, request: Request) -> None:
        self.drop(request)

    def drop(self, request: Request) -> None:
        self.requests.remove(request)
        self.cells.unpin(request)
        sequence, request.sequence = request.sequence, None
        if sequence:
            kept = sequence.tokens()
            self.cells.release(sequence)
            assert self.longest_shared(request.ns, kept) == len(kept), "what was released is found"

    @rule()
    def evict(self) -> None:
        used = self.books.used
        assert self.cells.evict_all() == used - self.books.used
        assert self.books.used == self.books.held_cells()

    @invariant()
    def books_and_cells_agree(self) -> None:
        self.books.check_integrity()
        assert CELLS - self.engine.free_cells == self.books.used

    @invariant()
    def admitted_requests_have_their_cells(self) -> None:
        assert self.engine.free_cells >= self.outstanding()

    @invariant()
    def pinned_tokens_are_in_cells(self) -> None:
        for request in self.requests:
            if request.pin:
                assert request.pin.sequence.length >= request.pin.tokens
                assert request.pin.sequence.shares(request.prompt) >= request.pin.tokens

    @invariant()
    def every_cell_holds_its_token(self) -> None:
        for sequence in self.books._sequences.values():
            if tokens := sequence.tokens():
                assert bytes(export(self.engine, sequence.id, 0, [len(tokens)])[0]) == rows_of(tokens)


CellsMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestCells = CellsMachine.TestCase


def held(books: Residency, letters: str, ns: bytes = b"") -> Sequence:
    """A sequence with all of `letters` in cells, sharing what is resident."""
    prompt = spelled(letters)
    source, shared = books.lookup(ns, prompt)
    sequence = books.open(ns, prompt)
    if source:
        books.link(source, sequence, shared)
    if len(prompt) > shared:
        books.extend(sequence, len(prompt) - shared)
    books.check_integrity()
    return sequence


def resident(books: Residency, letters: str, ns: bytes = b"") -> int:
    return books.lookup(ns, spelled(letters))[1]


def test_shared_cells_count_once_and_live_as_long_as_one_holder() -> None:
    books = Residency(100, 8)
    one, two = held(books, "aaaabbbb"), held(books, "aaaacccc")
    assert books.used == 12
    books.release(one)
    books.forget(one)
    assert books.used == 8
    assert resident(books, "aaaabbbb") == 4
    books.release(two)
    books.forget(two)
    assert books.used == 0
    books.check_integrity()


def test_the_least_recently_used_goes_first_and_a_pin_counts_as_use() -> None:
    books = Residency(100, 8)
    one, two, three = (held(books, letter * 4) for letter in "abc")
    for sequence in (two, one, three):
        books.release(sequence)
    pin = books.pin(two, 2)
    books.unpin(pin)
    gone = []
    while victim := books.victim():
        sequence, keep = victim
        assert keep == 0
        gone.append(sequence)
        books.forget(sequence)
    assert gone == [one, three, two]


def test_a_pin_keeps_its_part_of_a_victim() -> None:
    books = Residency(100, 8)
    sequence = held(books, "aaaabbbb")
    books.release(sequence)
    pin = books.pin(sequence, 3)
    assert books.victim() == (sequence, 3)
    assert books.held_cells() == 3
    books.truncate(sequence, 3)
    assert books.victim() is None
    assert books.oldest_unpinned() is None
    assert resident(books, "aaaabbbb") == 3
    with pytest.raises(AssertionError):
        books.forget(sequence)
    books.unpin(pin)
    assert books.victim() == (sequence, 0)


def test_a_sequence_that_another_covers_is_forgotten_on_release() -> None:
    books = Residency(100, 8)
    short, long, other = held(books, "aaaa"), held(books, "aaaabb"), held(books, "aaaa", ns=b"else")
    assert books.release(short) == [short]
    assert books.release(other) == []
    again = held(books, "aaaabbcc")
    assert books.release(long) == [long]
    assert books.release(again) == []
    assert len(books) == 2


def test_generated_tokens_are_found_like_prompt_tokens() -> None:
    books = Residency(100, 8)
    sequence = held(books, "aaaa")
    books.extend(sequence, 3, spelled("bcd").data)
    assert [resident(books, letters) for letters in ("aaaabcd", "aaaabcx", "aaaabcdd", "aaa", "b")] == [7, 6, 7, 3, 0]
    books.truncate(sequence, 5)
    assert resident(books, "aaaabcd") == 5


def test_a_prompts_last_token_is_shared_once_it_stays() -> None:
    """After a restore of all of it, it is dropped and decoded again: shared, that would take a cell nobody has claimed."""
    books = Residency(100, 8)
    generating, waiting = held(books, "aaaa"), held(books, "bbbb")
    assert resident(books, "aaaabb") == resident(books, "bbbbaa") == 3
    books.extend(generating, 1, spelled("a").data)
    assert resident(books, "aaaabb") == 4
    books.release(waiting)
    assert resident(books, "bbbbaa") == 4
