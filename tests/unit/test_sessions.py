"""Which requests belong together, what is remembered of them, and who is expected next; on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from appliance.kv.keys import chain
from appliance.request import GenerateRequest
from appliance.sessions import SESSION_BYTES, Session, Sessions
from appliance.types import BlockId, Namespace, SamplingParams, Tokens
from tests.support.kv import BLOCK_TOKENS, NS, prompt

OTHERS = Namespace("other")
ANSWER = Tokens.of([7, 8, 9])
QUESTION = Tokens.of([1, 2])


class Bench:
    """Sessions, a clock, and requests that come and end."""

    def __init__(self, max_bytes: int = 2**20) -> None:
        self.now_s = 1000.0
        self.sessions = Sessions(self._names, lambda: self.now_s, max_bytes)
        self._numbers = iter(range(10**6))

    def _names(self, ns: Namespace, tokens: Tokens) -> list[BlockId]:
        return chain(repr(ns).encode(), b"root", tokens, BLOCK_TOKENS)

    def comes(self, tokens: Tokens, name: str | None = None, ns: Namespace = NS) -> str:
        request_id = str(next(self._numbers))
        self.sessions.arrived(GenerateRequest(request_id, ns, tokens, SamplingParams(8), name))
        return request_id

    def turn(
        self, tokens: Tokens, name: str | None = None, ns: Namespace = NS, *, after_s: float = 0, lasts_s: float = 1
    ) -> Tokens:
        """One whole request; returns what the next prompt begins with."""
        self.now_s += after_s
        request_id = self.comes(tokens, name, ns)
        self.now_s += lasts_s
        self.sessions.finished(request_id, tokens + ANSWER)
        self.sessions.left(request_id)
        return tokens + ANSWER

    def all(self) -> list[Session]:
        return list(self.sessions.recent())


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert not any(session.running for session in bench.sessions.recent()), "every request ended"
    assert bench.sessions._nbytes == sum(session.nbytes for session in bench.sessions._used)


def test_a_named_session_is_what_its_client_said_last(bench: Bench) -> None:
    first = bench.turn(prompt(1, 40), "a")
    assert bench.sessions.find(NS, "a") == first
    second = bench.turn(first + QUESTION, "a")
    assert bench.sessions.find(NS, "a") == second
    unrelated = bench.turn(prompt(2, 20), "a")
    assert bench.sessions.find(NS, "a") == unrelated
    assert [session.turns for session in bench.all()] == [3]


def test_a_session_is_found_in_its_namespace_only(bench: Bench) -> None:
    bench.turn(prompt(1, 40), "a")
    for ns in (OTHERS, Namespace(NS.tenant, salt=b"s"), Namespace(NS.tenant, "n")):
        assert bench.sessions.find(ns, "a") is None
    assert bench.sessions.find(NS, "b") is None


def test_unnamed_turns_belong_together_by_what_they_begin_with(bench: Bench) -> None:
    tokens = prompt(1, 40)
    for _ in range(4):
        tokens = bench.turn(tokens, after_s=5) + QUESTION
    (session,) = bench.all()
    assert session.turns == 4
    assert session.tokens + QUESTION == tokens


def test_an_answer_the_client_cut_or_rewrote_does_not_part_a_session(bench: Bench) -> None:
    first = prompt(1, 40)
    bench.turn(first)
    bench.turn(first + Tokens.of([99]) + QUESTION)
    assert [session.turns for session in bench.all()] == [2]


def test_two_questions_about_one_document_are_two_sessions(bench: Bench) -> None:
    document = prompt(1, BLOCK_TOKENS * 3)
    one, other = (document + prompt(n, 20) for n in (2, 3))
    ends = [bench.turn(tokens) for tokens in (one, other)]
    for end in ends:
        bench.turn(end + QUESTION)
    assert [session.turns for session in bench.all()] == [2, 2]


def test_the_same_first_prompt_goes_on_as_one_session_and_a_new_one(bench: Bench) -> None:
    first = prompt(1, 40)
    bench.turn(first)
    bench.turn(first)
    assert [session.turns for session in bench.all()] == [2]
    bench.turn(first + Tokens.of([50]) + QUESTION)
    bench.turn(first + Tokens.of([60]) + QUESTION)
    assert [session.turns for session in bench.all()] == [1, 3]


def test_prompts_of_other_tenants_never_belong_together(bench: Bench) -> None:
    first = bench.turn(prompt(1, 40))
    bench.turn(first + QUESTION, ns=OTHERS)
    assert [(session.ns, session.turns) for session in bench.all()] == [(OTHERS, 1), (NS, 1)]


def test_a_prompt_shorter_than_a_block_is_remembered_by_name_only(bench: Bench) -> None:
    bench.turn(prompt(1, BLOCK_TOKENS - 1))
    assert not bench.all()
    bench.turn(prompt(1, BLOCK_TOKENS - 1), "a")
    assert len(bench.all()) == 1


def test_think_time_is_from_an_answer_to_the_next_prompt(bench: Bench) -> None:
    for _ in range(20):
        bench.turn(prompt(1, 40), "a", after_s=12, lasts_s=100)
    assert bench.all()[0].think_time.typical_s == pytest.approx(12, rel=0.05)


def test_requests_side_by_side_are_one_turn(bench: Bench) -> None:
    requests = [bench.comes(prompt(1, 40)) for _ in range(3)]
    (session,) = bench.all()
    assert (session.running, session.turns) == (3, 1)
    assert bench.sessions.ranked() == []
    for request_id in requests:
        bench.sessions.left(request_id)
    assert (session.running, bench.sessions.ranked()) == (0, [session])


def test_a_request_that_failed_leaves_its_prompt(bench: Bench) -> None:
    bench.sessions.left(bench.comes(prompt(1, 40), "a"))
    assert bench.sessions.find(NS, "a") == prompt(1, 40)
    bench.sessions.left("never came")


def test_an_answer_that_ends_late_does_not_undo_the_next_turn(bench: Bench) -> None:
    slow = bench.comes(prompt(1, 40), "a")
    later = bench.turn(prompt(2, 40), "a")
    bench.sessions.finished(slow, prompt(1, 40) + ANSWER)
    assert bench.sessions.find(NS, "a") == later


def test_who_is_due_is_ranked_before_who_was_just_here_and_who_never_came_back(bench: Bench) -> None:
    for _ in range(6):
        bench.turn(prompt(1, 40), "every minute", after_s=60)
    bench.turn(prompt(2, 40), "once")
    bench.now_s += 48
    bench.turn(prompt(3, 40), "new")
    assert [session.name for session in bench.sessions.ranked()] == ["every minute", "new", "once"]
    bench.now_s += 3600 * 24
    assert bench.sessions.ranked() == []


def test_of_equals_the_last_used_is_ranked_first(bench: Bench) -> None:
    bench.turn(prompt(1, 40), "one", lasts_s=0)
    bench.turn(prompt(2, 40), "two", lasts_s=0)
    assert [session.name for session in bench.sessions.ranked()] == ["two", "one"]


def test_what_is_not_expected_is_not_ranked_before_its_next_turn(bench: Bench) -> None:
    bench.turn(prompt(1, 40), "a")
    bench.sessions.expect_none()
    assert bench.sessions.ranked() == []
    bench.turn(prompt(1, 40), "a")
    assert len(bench.sessions.ranked()) == 1


def test_memory_has_a_bound_and_the_least_recently_used_goes_first() -> None:
    each = SESSION_BYTES + 4 * 43
    bench = Bench(max_bytes=3 * each)
    for name in "abcd":
        bench.turn(prompt(ord(name), 40), name)
    bench.turn(prompt(ord("b"), 40), "b")
    bench.turn(prompt(9, 40))
    assert [session.name for session in bench.all()] == [None, "b", "d"]
    assert bench.sessions.find(NS, "a") is None
    bench.turn(prompt(10, 40))
    bench.turn(prompt(11, 40))
    bench.turn(prompt(12, 40))
    assert not bench.sessions._named
    assert len(bench.sessions._unnamed) == 3


def test_who_runs_is_not_forgotten() -> None:
    bench = Bench(max_bytes=1)
    running = bench.comes(prompt(1, 40), "a")
    bench.turn(prompt(2, 40), "b")
    assert [session.name for session in bench.all()] == ["a"]
    bench.sessions.finished(running, prompt(1, 40) + ANSWER)
    assert len(bench.sessions) == 0
