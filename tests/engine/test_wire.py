"""Frames and their values: what was sent arrives, and whatever else arrives is an error, at once and in little memory."""

from __future__ import annotations

import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine import wire
from appliance.engine.client import Done, Event, NewTokens, Prefilled
from appliance.engine.protocol import LENGTH, MAX_MESSAGE_BYTES, pack, unpack
from appliance.engine.request import Failed
from appliance.errors import ConfigError, EngineError, KvctlError, ModelError, RequestError, RestoreError
from appliance.types import FinishReason, SamplingParams, TokenLogprob, Tokens
from tests.support.engines import null_config, null_engine


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def sent(message: dict[str, Any]) -> dict[str, Any]:
    return unpack(pack(message)[LENGTH.size :])


@pytest.mark.parametrize(
    "event",
    [
        Prefilled(5, 0.5),
        NewTokens(
            Tokens.of([1, 2**31 - 1]), "é", (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5))), TokenLogprob(2, -1.0))
        ),
        NewTokens(Tokens(), ""),
        Done(FinishReason.STOP, 2, 1.5, 4),
        Failed("no"),
    ],
)
def test_an_event_arrives_as_it_was(event: Event | Failed) -> None:
    message = sent(wire.event_to_map("r", event))
    assert message["request"] == "r"
    assert wire.event_from_map(message) == event


def test_settings_arrive_as_they_were() -> None:
    config, info = null_config(), null_engine().info
    assert wire.config_from_map(sent(wire.config_to_map(config))) == config
    assert wire.info_from_map(sent(wire.info_to_map(info))) == info
    for sampling in (
        SamplingParams(0),
        SamplingParams(9, 0.5, 0.9, 3, 0.1, 1.1, 0.2, 0.3, 7, ("a", "€"), ((1, -100.0),), 2, True),
    ):
        assert wire.sampling_from_map(sent(wire.sampling_to_map(sampling))) == sampling


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineError("a"), EngineError),
        (ModelError("b"), ModelError),
        (RestoreError("c"), RestoreError),
        (RequestError("d", param="prompt", code="x", status=422), RequestError),
        (ConfigError("e"), EngineError),
    ],
)
def test_an_error_arrives_as_its_kind(error: KvctlError, kind: type[KvctlError]) -> None:
    got = wire.error_from_map(sent(wire.error_to_map(error)))
    assert type(got) is kind
    assert str(got) == str(error)
    if isinstance(error, RequestError) and isinstance(got, RequestError):
        assert (got.param, got.code, got.status) == (error.param, error.code, error.status)


def test_frames_arrive_one_by_one_however_they_were_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    for byte in pack({"a": 1}) + pack({"b": b"\xff"}):
        theirs.send(bytes((byte,)))
    theirs.close()
    assert [wire.receive(ours) for _ in range(3)] == [{"a": 1}, {"b": b"\xff"}, None]


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 5, -1])
def test_a_peer_that_closes_within_a_frame_is_a_closed_peer(
    pair: tuple[socket.socket, socket.socket], keep: int
) -> None:
    ours, theirs = pair
    theirs.sendall(pack({"op": "stats", "call": 1})[:keep])
    theirs.close()
    assert wire.receive(ours) is None


@pytest.mark.parametrize(
    "frame",
    [
        LENGTH.pack(MAX_MESSAGE_BYTES + 1),
        LENGTH.pack(2**32 - 1),
        pytest.param(LENGTH.pack(0), id="empty"),
        pytest.param(LENGTH.pack(5) + b"\xdd\xff\xff\xff\xff", id="array of 4G"),
        pytest.param(LENGTH.pack(5) + b"\xdf\xff\xff\xff\xff", id="map of 4G"),
        pytest.param(LENGTH.pack(5) + b"\xc6\xff\xff\xff\xff", id="4 GiB of bytes"),
        pytest.param(LENGTH.pack(5) + b"\xdb\xff\xff\xff\xff", id="4 GiB of text"),
        pytest.param(LENGTH.pack(6) + b"\xc9\xff\xff\xff\xff\x01", id="4 GiB of extension"),
        pytest.param(LENGTH.pack(5000) + b"\x91" * 5000, id="nested arrays"),
        pytest.param(LENGTH.pack(5000) + b"\x81\x01" * 2500, id="nested maps"),
        pytest.param(LENGTH.pack(5000) + (b"\xdd" + struct.pack(">I", 4990)) * 1000, id="nested wide arrays"),
        pytest.param(LENGTH.pack(1) + b"\xc1", id="no such type"),
        pytest.param(LENGTH.pack(1) + b"\x90", id="not a map"),
        pytest.param(LENGTH.pack(3) + b"\x80\x80\x80", id="more than one map"),
        pytest.param(LENGTH.pack(5) + b"\x81\xa2\xff\xfe\x01", id="not UTF-8"),
        pytest.param(LENGTH.pack(3) + b"\x81\x90\x01", id="a key that is a list"),
    ],
)
def test_a_malformed_frame_is_an_error_and_allocates_nothing_big(
    pair: tuple[socket.socket, socket.socket], frame: bytes
) -> None:
    ours, theirs = pair
    theirs.sendall(frame)
    tracemalloc.start()
    try:
        with pytest.raises(wire.MALFORMED):
            wire.receive(ours)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
GOOD: list[tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = [
    (wire.config_from_map, wire.config_to_map(null_config())),
    (wire.info_from_map, wire.info_to_map(null_engine().info)),
    (wire.sampling_from_map, wire.sampling_to_map(SamplingParams(3))),
    (wire.error_from_map, wire.error_to_map(RequestError("x", param="p"))),
    (wire.event_from_map, wire.event_to_map("r", Done(FinishReason.STOP, 2, 1.5, 4))),
    (wire.event_from_map, wire.event_to_map("r", NewTokens(Tokens.of([1]), "x", (TokenLogprob(1, -0.5, ((1, -0.5),)),)))),
]  # fmt: skip


@given(st.sampled_from(GOOD), st.data())
def test_a_field_of_any_other_value_is_an_error_of_its_kind(
    good: tuple[Callable[[dict[str, Any]], object], dict[str, Any]], data: st.DataObject
) -> None:
    """Never an exception that the reader of the socket does not expect."""
    decode, message = good
    name = data.draw(st.sampled_from(sorted(message)) | st.text(max_size=8))
    value = data.draw(VALUES)
    with suppress(*wire.MALFORMED):
        decode(sent({**message, name: value}))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_an_error(body: bytes) -> None:
    try:
        message = unpack(body)
    except wire.MALFORMED:
        return
    assert isinstance(message, dict)
