"""TextStream: whole characters, nothing of a stop string, whatever the pieces were."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.detok import TextStream

ALPHABET = "ab€🧠"  # one, three and four bytes
TEXTS = st.text(st.sampled_from(ALPHABET), max_size=20)
STOPS = st.lists(st.text(st.sampled_from(ALPHABET), min_size=1, max_size=4), max_size=3)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(i % (len(data) + 1) for i in at)})
    return [data[a:b] for a, b in pairwise(edges)]


def chunks(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [*map(stream.feed, pieces), stream.finish()]


def expected(text: str, stops: list[str]) -> str:
    """Up to the stop string that is complete first; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))]
    return text


@given(TEXTS, st.lists(st.integers(0, 200)))
def test_chunks_are_whole_characters_and_lose_nothing(text: str, at: list[int]) -> None:
    stream = TextStream()
    given_out = b""
    for piece in cut(text.encode(), at):
        given_out += piece
        chunk = stream.feed(piece)
        text_so_far = given_out.decode(errors="ignore")
        assert text_so_far.endswith(chunk), "as much as is whole, at once"
        assert "\ufffd" not in chunk
    assert "".join(chunks(TextStream(), cut(text.encode(), at))) == text


@given(TEXTS, STOPS, st.lists(st.integers(0, 200)))
def test_nothing_of_a_stop_string_or_behind_it_is_given_out(text: str, stops: list[str], at: list[int]) -> None:
    stream = TextStream(stops)
    assert "".join(chunks(stream, cut(text.encode(), at))) == expected(text, stops)
    assert stream.stopped is any(stop in text for stop in stops)


@given(TEXTS, STOPS, st.lists(st.integers(0, 200)))
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str], at: list[int]) -> None:
    stream = TextStream(stops)
    fed, given_out = b"", ""
    for piece in cut(text.encode(), at):
        fed += piece
        given_out += stream.feed(piece)
        held = fed.decode(errors="ignore")[len(given_out) :]
        assert not held or stream.stopped or any(stop.startswith(held) for stop in stops)


@given(st.binary(max_size=12), st.lists(st.integers(0, 200)))
def test_invalid_bytes_are_replaced_wherever_they_are_cut(data: bytes, at: list[int]) -> None:
    assert "".join(chunks(TextStream(), cut(data, at))) == data.decode(errors="replace")


@pytest.mark.parametrize("tail", [b"\xe2", b"\xe2\x82", b"\xf0\x9f\xa7"])
def test_an_unfinished_character_is_flushed_as_one_replacement(tail: bytes) -> None:
    stream = TextStream()
    assert stream.feed(b"a" + tail) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_text_held_back_is_flushed_at_the_end() -> None:
    stream = TextStream(["stop here"])
    assert stream.feed(b"so stop") == "so "
    assert stream.feed(b" now st") == "stop now "
    assert stream.finish() == "st"
    assert not stream.stopped
