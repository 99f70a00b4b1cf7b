"""Conversations about documents, the same for every appliance that is measured: who says what, and when.

Each session asks about a document of its own, several turns, after a system prompt that all sessions share; the reader
thinks between an answer and the next question. Invariant: the same workload gives the same prompts and pauses. Prompts
are token ids, so that a turn's prompt begins with exactly what was sent and answered before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from appliance.types import Tokens

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Workload:
    sessions: int
    turns: int
    document_tokens: tuple[int, int]
    """Fewest and most of a document; spread evenly over the ratio between them."""
    system_tokens: int
    answer_tokens: int
    think_s: float
    """Mean pause between an answer and the next question."""
    seed: int

    @property
    def longest_tokens(self) -> int:
        """No prompt and answer are longer."""
        turn = QUESTION_TOKENS + self.answer_tokens
        return self.system_tokens + self.document_tokens[1] + self.turns * turn


QUESTION_TOKENS = 96
"""At most, markers of the turn included."""


@dataclass(frozen=True)
class Turn:
    pause_s: float
    """Between the answer before and this question; of the first turn, after the start."""
    ask: list[int]
    """What follows the answer before."""


@dataclass(frozen=True)
class Session:
    turns: Sequence[Turn]

    def prompt(self, answers: Sequence[list[int]]) -> list[int]:
        """Ids of the next turn's prompt after these answers."""
        ids: list[int] = []
        for turn, answer in zip(self.turns, answers, strict=False):
            ids += turn.ask + answer
        return ids + self.turns[len(answers)].ask


def sessions(workload: Workload, tokenize: Tokenize) -> list[Session]:
    draw = random.Random(workload.seed)
    system = _cut(tokenize, "<|im_start|>system\nAnswer from the log book alone.\n", _rules(), workload.system_tokens)
    return [_session(workload, number, system, tokenize, draw) for number in range(workload.sessions)]


def _session(workload: Workload, number: int, system: list[int], tokenize: Tokenize, draw: random.Random) -> Session:
    low, high = workload.document_tokens
    # even steps, so that no seed is easier than another; the order in which sessions come is shuffled by their start
    share = (number + 0.5) / workload.sessions
    size = round(low * (high / low) ** share)
    document = _cut(tokenize, f"<|im_end|>\n<|im_start|>user\nLog book {number}.\n", _entries(draw), size)
    turns = []
    for n in range(workload.turns):
        begins = "<|im_end|>\n<|im_start|>user\n" if n else "\n"
        question = f"{n + 1}. What did pump {draw.randrange(100)} do on day {draw.randrange(1000)}?"
        asked = tokenize(f"{begins}{question}<|im_end|>\n<|im_start|>assistant\n")[:QUESTION_TOKENS]
        pause_s = draw.expovariate(1 / workload.think_s) if workload.think_s else 0.0
        turns.append(Turn(pause_s, asked if n else system + document + asked))
    return Session(turns)


def _cut(tokenize: Tokenize, head: str, lines: Iterator[str], tokens: int) -> list[int]:
    """Exactly so many ids of a text."""
    ids = tokenize(head)
    while len(ids) < tokens:
        ids += tokenize("".join(next(lines) for _ in range(64)))
    return ids[:tokens]


def _rules() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"Rule {number}: name the day and the line you read, and no more than {number % 7 + 1} of them.\n"


def _entries(draw: random.Random) -> Iterator[str]:
    day = 0
    while True:
        day += 1
        pump, hours, valve = draw.randrange(100), draw.randrange(97), draw.randrange(41)
        yield f"Day {day}: pump {pump} ran {hours} hours, valve {valve} was replaced.\n"


def reusable(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[int]:
    """Of each prompt, in the order they were sent, the leading tokens that an infinite cache would have: those it shares
    with any earlier prompt and answer. The last token of a prompt is always computed.
    """
    earlier: list[Tokens] = []
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = Tokens.of(prompt)
        shared = max((tokens.common_prefix(other) for other in earlier), default=0)
        found.append(min(shared, len(tokens) - 1))
        earlier.append(tokens + Tokens.of(answer))
    return found
