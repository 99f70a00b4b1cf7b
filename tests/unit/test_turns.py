"""The queue: nobody starves, nobody saves up, nobody fills it for all."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Overloaded
from appliance.turn import OVERTAKEN, Turn
from appliance.turns import Turns

DEAREST = 50


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


def names(turns: Turns) -> list[str]:
    return [turn.request_id for turn in turns.line()]


def grant(turn: Turn) -> bool:
    return turn.granted.done() and turn.granted.exception() is None


@dataclass
class Head:
    """The first of a tenant's queue, and what others were given since it became that."""

    turn: Turn
    given: Counter[str] = field(default_factory=Counter)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.sampled_from("abcd"), st.integers(1, DEAREST)),
            st.tuples(st.just("leave"), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("put back"), st.integers(0, 2), st.just(0)),
        ),
        max_size=120,
    ),
)
def test_no_request_waits_while_another_tenant_is_given_much_more(max_running: int, steps: list) -> None:  # type: ignore[type-arg]
    async def play() -> None:
        turns = Turns(max_running, 10**6, Clock())
        held: list[Turn] = []
        queues: dict[str, list[Turn]] = {}
        heads: dict[str, Head] = {}
        costs: dict[Turn, int] = {}
        overtaken: Counter[Turn] = Counter()

        def look() -> None:
            """Take note of grants until there are none."""
            while new := [turn for queue in queues.values() for turn in queue if grant(turn)]:
                (turn,) = new
                queues[turn.tenant].remove(turn)
                for other in queues[turn.tenant]:
                    overtaken[other] += other.number < turn.number
                    assert overtaken[other] <= OVERTAKEN, "inside a tenant nobody is overtaken for ever"
                held.append(turn)
                for head in heads.values():
                    if head.turn.tenant != turn.tenant:
                        head.given[turn.tenant] += costs[turn]
                turns.has_cells(turn)
                turns.expect(turn, costs[turn])
            for tenant, queue in queues.items():
                if queue and (tenant not in heads or heads[tenant].turn is not queue[0]):
                    heads[tenant] = Head(queue[0])
                elif not queue:
                    heads.pop(tenant, None)
            for head in heads.values():
                assert max(head.given.values(), default=0) <= 2 * (max_running + 1) * DEAREST
            assert len(held) == turns.running <= max_running

        count = 0
        for step, which, cost in [*steps, *[("leave", 0, 0)] * len(steps)]:
            if step == "enter":
                turn = turns.enter(str(count), which, cost, alone=False)
                costs[turn] = cost
                count += 1
                queues.setdefault(which, []).append(turn)
            elif held:
                turn = held.pop(which % len(held))
                if step == "leave":
                    turns.leave(turn)
                else:
                    queues[turn.tenant].append(turn)
                    queues[turn.tenant].sort(key=lambda each: each.number)
                    turns.put_back(turn, 0)
                    costs[turn] = 1
            look()
        assert not turns.waiting, "everybody had a turn"

    asyncio.run(play())


async def test_the_next_turn_is_of_the_tenant_that_was_served_least() -> None:
    turns = Turns(1, 10, Clock())
    first = turns.enter("a0", "a", 5, alone=False)
    for n in range(1, 4):
        turns.enter(f"a{n}", "a", 5, alone=False)
    for n in range(3):
        turns.enter(f"b{n}", "b", 5, alone=False)
    turns.has_cells(first)
    turns.expect(first, 100)
    assert names(turns) == ["b0", "b1", "b2", "a1", "a2", "a3"]
    turns.leave(first)
    assert names(turns)[0] == "b0"


async def test_a_tenant_that_was_idle_neither_saves_up_nor_pays() -> None:
    turns = Turns(1, 10, Clock())
    for n in range(5):
        turn = turns.enter(f"a{n}", "a", 1000, alone=False)
        turns.has_cells(turn)
        turns.expect(turn, 1000)
        turns.leave(turn)
    running = turns.enter("b0", "b", 10, alone=False)
    turns.has_cells(running)
    turns.expect(running, 10)
    for n in range(1, 4):
        turns.enter(f"b{n}", "b", 10, alone=False)
        turns.enter(f"a{n}", "a", 10, alone=False)
    assert names(turns) == ["b1", "a1", "b2", "a2", "b3", "a3"]


async def test_what_was_not_computed_is_not_charged() -> None:
    turns = Turns(2, 10, Clock())
    cached = turns.enter("a0", "a", 1000, alone=False)
    turns.has_cells(cached)
    dear = turns.enter("b0", "b", 100, alone=False)
    turns.has_cells(dear)
    turns.enter("b1", "b", 100, alone=False)
    turns.enter("a1", "a", 100, alone=False)
    assert names(turns)[0] == "b1"
    turns.expect(cached, 1)
    assert names(turns)[0] == "a1"


async def test_one_at_a_time_waits_for_cells() -> None:
    turns = Turns(4, 10, Clock())
    entered = [turns.enter(str(n), "a", 1, alone=False) for n in range(3)]
    assert [turn.granted.done() for turn in entered] == [True, False, False]
    turns.has_cells(entered[0])
    assert [turn.granted.done() for turn in entered] == [True, True, False]
    turns.leave(entered[1])
    assert entered[2].granted.done()


async def test_one_tenant_leaves_room_in_the_queue_for_others() -> None:
    turns = Turns(1, 8, Clock())
    for n in range(9):
        turns.enter(f"a{n}", "a", 1, alone=False)
    with pytest.raises(Overloaded):
        turns.enter("b", "b", 1, alone=False)
    for turn in list(turns.line())[4:]:
        turns.cancel(turn)
        assert isinstance(turn.granted.exception(), Overloaded)
    turns.enter("b0", "b", 1, alone=False)
    turns.enter("a9", "a", 1, alone=False)
    with pytest.raises(Overloaded, match="of your requests"):
        turns.enter("a10", "a", 1, alone=False)
    turns.enter("b1", "b", 1, alone=False)


async def test_who_is_refused_learns_when_to_come_back() -> None:
    clock = Clock()
    turns = Turns(2, 4, clock)
    for n in range(6):
        turn = turns.enter(str(n), "a", 1, alone=False)
        if n < 2:
            turns.has_cells(turn)
    clock.now_s += 40
    before_s = turns.retry_after_s()
    turns.leave(next(iter(turns._held)))
    turns.enter("more", "a", 1, alone=False)
    with pytest.raises(Overloaded) as refused:
        turns.enter("too many", "a", 1, alone=False)
    assert before_s < refused.value.retry_after_s <= 120


async def test_a_suspect_runs_alone() -> None:
    turns = Turns(4, 10, Clock())
    good = turns.enter("good", "a", 1, alone=False)
    turns.has_cells(good)
    suspect = turns.enter("suspect", "a", 1, alone=True)
    other = turns.enter("other", "a", 1, alone=False)
    assert not suspect.granted.done()
    turns.leave(good)
    assert suspect.granted.done()
    turns.has_cells(suspect)
    assert not other.granted.done()
    turns.leave(suspect)
    assert other.granted.done()


async def test_a_turn_is_taken_from_who_was_served_more_the_latest_first() -> None:
    clock = Clock()
    turns = Turns(2, 10, clock)
    held = [turns.enter(f"a{n}", "a", 10, alone=False) for n in range(2)]
    for turn in held:
        turns.has_cells(turn)
        turns.expect(turn, 10)
        turn.computing = True
    late = turns.enter("b", "b", 10, alone=False)
    clock.now_s += 60
    assert turns.overdue(5) is None, "not served more, yet"
    turns.charge(held[0], 100)
    assert turns.overdue(5) is held[1]
    assert turns.overdue(5) is held[0], "once each"
    assert turns.overdue(5) is None
    turns.put_back(held[1], 0)
    assert late.granted.done()
    assert names(turns) == ["b", "a1"]


async def test_nobody_is_preempted_for_one_of_the_same_tenant() -> None:
    clock = Clock()
    turns = Turns(1, 10, clock)
    held = turns.enter("a0", "a", 10, alone=False)
    turns.has_cells(held)
    turns.expect(held, 10**6)
    held.computing = True
    turns.enter("a1", "a", 1, alone=False)
    clock.now_s += 60
    assert turns.overdue(5) is None


async def test_inside_a_tenant_who_has_least_to_compute_goes_first_and_nobody_waits_for_ever() -> None:
    turns = Turns(1, 100, Clock())
    turns.enter("runs", "a", 5, alone=False)
    for name, expected in (("long", 5000), ("short", 30), ("longer", 9000), ("shorter", 10)):
        turns.enter(name, "a", expected, alone=False)
    assert names(turns)[1:] == ["shorter", "short", "long", "longer"]
    order = []
    for n in range(40):
        running = next(iter(turns._held))
        turns.has_cells(running)
        order.append(running.request_id)
        turns.enter(f"s{n}", "a", 20, alone=False)
        turns.leave(running)
    assert order.index("long") <= 1 + 2 + OVERTAKEN
    assert order.index("longer") <= 1 + 4 + 2 * OVERTAKEN


async def test_one_long_prompt_is_read_at_a_time_and_short_ones_are_not_held_up() -> None:
    turns = Turns(4, 100, Clock())
    first = turns.enter("first", "a", 4000, alone=False)
    turns.has_cells(first)
    turns.expect(first, 4000)
    second = turns.enter("second", "a", 3000, alone=False)
    question = turns.enter("question", "a", 60, alone=False)
    other = turns.enter("other tenant's", "b", 60, alone=False)
    assert question.granted.done()
    turns.has_cells(question)
    assert other.granted.done()
    turns.has_cells(other)
    assert not second.granted.done()
    turns.has_read(first)
    assert second.granted.done()


async def test_a_much_shorter_prompt_is_read_beside_a_giant() -> None:
    turns = Turns(4, 100, Clock())
    giant = turns.enter("giant", "a", 100_000, alone=False)
    turns.has_cells(giant)
    turns.expect(giant, 100_000)
    assert turns.enter("long", "a", 5000, alone=False).granted.done()


async def test_who_turns_out_to_have_little_to_compute_is_in_nobodys_way() -> None:
    turns = Turns(4, 100, Clock())
    cached = turns.enter("cached", "a", 5000, alone=False)
    turns.has_cells(cached)
    waits = turns.enter("long", "a", 5000, alone=False)
    assert not waits.granted.done()
    turns.expect(cached, 20)
    assert waits.granted.done()


async def test_a_long_prompt_that_gives_up_its_turn_lets_the_next_one_be_read() -> None:
    turns = Turns(4, 100, Clock())
    first, second = (turns.enter(name, "a", 5000, alone=False) for name in ("first", "second"))
    turns.has_cells(first)
    turns.leave(first)
    assert second.granted.done()
