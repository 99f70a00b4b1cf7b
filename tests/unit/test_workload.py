"""The conversations of `kvctl bench sessions`, and what is counted of them."""

from __future__ import annotations

import pytest

from kvctl.bench.sessions import percentile
from kvctl.bench.workload import Workload, reusable, sessions

WORKLOAD = Workload(
    sessions=4, turns=3, document_tokens=(300, 900), system_tokens=100, answer_tokens=8, think_s=2.0, seed=1
)


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_the_same_workload_gives_the_same_prompts_and_pauses() -> None:
    assert sessions(WORKLOAD, tokenize) == sessions(WORKLOAD, tokenize)


def test_every_session_begins_with_the_same_system_prompt_and_nothing_more() -> None:
    first = [session.turns[0].ask for session in sessions(WORKLOAD, tokenize)]
    shared = first[0][:100]
    assert all(ask[:100] == shared for ask in first)
    assert len({tuple(ask[:160]) for ask in first}) == len(first)


def test_documents_span_the_asked_for_lengths_and_no_prompt_is_longer_than_promised() -> None:
    planned = sessions(WORKLOAD, tokenize)
    answers = [[7] * WORKLOAD.answer_tokens] * (WORKLOAD.turns - 1)
    assert all(300 + 100 <= len(session.turns[0].ask) <= 900 + 100 + 96 for session in planned)
    assert all(len(session.prompt(answers)) + WORKLOAD.answer_tokens <= WORKLOAD.longest_tokens for session in planned)


def test_a_turn_begins_with_all_that_was_sent_and_answered_before() -> None:
    session = sessions(WORKLOAD, tokenize)[0]
    one = session.prompt([])
    two = session.prompt([[5, 6]])
    assert two[: len(one) + 2] == [*one, 5, 6]
    assert len(two) > len(one) + 2


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 3]], [0]),
        ([[1, 2, 3], [1, 2, 4]], [0, 2]),
        ([[1, 2, 3], [1, 2, 3]], [0, 2]),
        ([[1, 2, 3], [1, 2, 3, 9, 8, 7]], [0, 5]),
        ([[1, 2, 3], [4, 5], [4, 5, 9, 1]], [0, 0, 3]),
    ],
)
def test_an_infinite_cache_has_prompts_and_answers_but_never_a_prompts_last_token(
    prompts: list[list[int]], expected: list[int]
) -> None:
    assert reusable(prompts, [[9, 8]] * len(prompts)) == expected


def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert percentile(values, 0.95) == 95.0
    assert percentile(values, 0.5) == 50.0
    assert percentile([3.0], 0.95) == 3.0
