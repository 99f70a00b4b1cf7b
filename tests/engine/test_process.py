"""A real engine process through the proxy: streams, crashes, cancel storms, and what the process may hold."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest

from appliance.engine import process as process_module
from appliance.engine.base import EngineConfig
from appliance.engine.client import Done, NewTokens
from appliance.engine.process import OPENMP, PASSED_ENVIRONMENT, ROOT
from appliance.engine.protocol import LENGTH, MAX_MESSAGE_BYTES, pack
from appliance.engine.proxy import EngineProxy
from appliance.engine.wire import config_to_map, receive
from appliance.errors import EngineDied, EngineError, ModelError, RequestError, RestoreError
from appliance.server.errors import describe
from appliance.types import FinishReason, Tokens
from tests.support.engines import NULL_BLOCK, greedy, null_config, prompt
from tests.support.models import tiny_config
from tests.support.scheduling import reference

BLOCK = NULL_BLOCK
CONFIG = null_config(context_tokens=2**16, max_sequences=64)
SLOT_BYTES, SLOTS = 4096, 64
OWNER = b"an owner"
NS = b"a namespace"
ENDLESS = 60_000
"""More tokens than any test waits for."""
START_S = 60.0


@pytest.fixture
def pool() -> Iterator[tuple[int, mmap.mmap]]:
    """(descriptor, memory) of a shared pool, as the control process makes it."""
    fd = os.memfd_create("pool")
    os.ftruncate(fd, SLOT_BYTES * SLOTS)
    with mmap.mmap(fd, SLOT_BYTES * SLOTS) as memory:
        yield fd, memory
    os.close(fd)


@asynccontextmanager
async def running(config: EngineConfig, pool_fd: int | None = None) -> AsyncIterator[EngineProxy]:
    engine = EngineProxy(config, pool_fd=pool_fd, start_timeout_s=START_S)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def engine(pool: tuple[int, mmap.mmap]) -> AsyncIterator[EngineProxy]:
    async with running(CONFIG, pool[0]) as engine:
        await engine.attach_pool(SLOT_BYTES, SLOTS)
        yield engine


async def completion(engine: EngineProxy, request: str, tokens: Tokens, max_tokens: int) -> list[int]:
    await engine.begin(request, NS, tokens, max_tokens, OWNER)
    found: list[int] = []
    async for event in engine.run(request, greedy(max_tokens)):
        if isinstance(event, NewTokens):
            found += event.tokens
    await engine.release(request)
    return found


async def first_token(engine: EngineProxy, request: str) -> AsyncIterator[None]:
    """Runs without end; steps once at the first token, then at the end."""
    started = False
    async with aclosing(engine.run(request, greedy(ENDLESS))) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, NewTokens) and not started:
                started = True
                yield


def kill(engine: EngineProxy) -> int:
    pid = engine.pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


# --- calls ----------------------------------------------------------------------------------------------------------


async def test_requests_at_once_complete_as_alone(engine: EngineProxy) -> None:
    prompts = [prompt(20 + seed, seed) for seed in range(12)]
    found = await asyncio.gather(*(completion(engine, str(i), tokens, 20) for i, tokens in enumerate(prompts)))
    assert found == [reference(tokens, 20) for tokens in prompts]


async def test_kv_crosses_through_the_pool_only(engine: EngineProxy, pool: tuple[int, mmap.mmap]) -> None:
    tokens = prompt(3 * BLOCK)
    expected = await completion(engine, "a", tokens, 10)
    await engine.begin("b", NS, tokens, 10, OWNER)
    await engine.restore("b", 0, ())
    async for _ in engine.run("b", greedy(0)):
        pass
    await engine.export("b", [(i * BLOCK, BLOCK, 7 + i) for i in range(3)])
    await engine.release("b")
    await engine.evict()
    assert any(pool[1][7 * SLOT_BYTES : 10 * SLOT_BYTES])
    assert await engine.begin("c", NS, tokens, 10, OWNER) == 0
    assert await engine.restore("c", 0, [(7 + i, BLOCK, BLOCK) for i in range(3)]) == len(tokens)
    await engine.release("c")
    assert await completion(engine, "d", tokens, 10) == expected
    for slot in (SLOTS, -1, 2**40):
        await engine.begin("e", NS, prompt(BLOCK, 1), 1, OWNER)
        with pytest.raises(EngineError):
            await engine.restore("e", 0, [(slot, BLOCK, BLOCK)])
        await engine.release("e")


async def test_what_is_wrong_with_a_request_is_said_as_such(engine: EngineProxy) -> None:
    with pytest.raises(RequestError) as caught:
        await engine.begin("r", NS, prompt(10), ENDLESS * 2, OWNER)
    assert caught.value.code == "context_length_exceeded"
    await engine.begin("r", NS, prompt(10), 10, OWNER)  # the refused one left no trace
    with pytest.raises(EngineError):
        await engine.export("r", [(0, 5, 0)])
    with pytest.raises(EngineError):
        await engine.restore("unknown", 0, ())
    await engine.release("r")
    await engine.release("r")


async def test_what_a_sampler_refuses_is_the_requests_fault(engine: EngineProxy) -> None:
    await engine.begin("r", NS, prompt(10), 10, OWNER)
    with pytest.raises(RequestError) as caught:
        async for _ in engine.run("r", greedy(5, grammar="root ::= [a-z]")):  # the null engine follows none
            pass
    assert caught.value.status == 422
    await engine.release("r")


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else "x"


async def test_a_second_run_is_refused_and_the_first_goes_on(engine: EngineProxy) -> None:
    await engine.begin("r", NS, prompt(10), 200, OWNER)
    found: list[int] = []
    async for event in engine.run("r", greedy(200)):
        if isinstance(event, NewTokens):
            found += event.tokens
        if len(found) == 3:
            with pytest.raises(EngineError):
                await anext(engine.run("r", greedy(1)))
    assert found == reference(prompt(10), 200)
    with pytest.raises(EngineError):
        await anext(engine.run("r", greedy(1)))
    await engine.release("r")


@pytest.mark.parametrize("content", ["\ud800", 2**70, nested(600), "x" * (MAX_MESSAGE_BYTES + 1)], ids=lambda _: "")
async def test_what_cannot_be_sent_is_the_requests_fault(engine: EngineProxy, content: object) -> None:
    pid = engine.pid
    with pytest.raises(RequestError):
        await engine.render([{"role": "user", "content": content}])
    assert await engine.tokenize("x", add_special=False, parse_special=False) == Tokens.of([120])
    assert engine.pid == pid


# --- death ----------------------------------------------------------------------------------------------------------


async def test_a_killed_engine_fails_what_was_in_flight_and_comes_back(engine: EngineProxy) -> None:
    await engine.begin("streams", NS, prompt(10), ENDLESS, OWNER)
    await engine.begin("waits", NS, prompt(10, 1), ENDLESS, OWNER)
    stream = first_token(engine, "streams")
    await anext(stream)
    waiting = asyncio.create_task(engine.restore("waits", 0, ()))
    generation, old = engine.generation, kill(engine)
    with pytest.raises(EngineDied) as caught:
        await anext(stream)
    failed = describe(caught.value, "r")
    assert (failed.status, "retry-after" in failed.headers) == (503, True)
    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineDied):
        await engine.export("streams", [(0, BLOCK, 0)])
    for request in ("streams", "waits"):
        await engine.cancel(request)
        await engine.release(request)
    assert await completion(engine, "streams", prompt(10), 10) == reference(prompt(10), 10)
    assert engine.generation == generation + 1
    assert engine.pid not in (None, old)
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)  # it was reaped


async def test_a_call_made_while_no_engine_runs_waits_for_the_next(engine: EngineProxy) -> None:
    for _ in range(3):
        kill(engine)
        with suppress(EngineDied):  # the call may be sent before the death is known
            await engine.stats()
        assert (await engine.stats()).cells_used == 0
    await engine.begin("r", NS, prompt(5), 1, OWNER)
    assert await engine.restore("r", 0, ()) == 0
    await engine.release("r")


async def test_an_engine_that_cannot_be_started_is_tried_again(
    engine: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = process_module._launch, [0]

    def launch(socket_fd: int, pool_fd: int | None) -> subprocess.Popen[bytes]:
        if failures[0] < 2:
            failures[0] += 1
            raise OSError("no memory for another process")
        return real(socket_fd, pool_fd)

    monkeypatch.setattr(process_module, "_launch", launch)
    kill(engine)
    refused = 0
    while failures != [2] or engine.pid is None:
        with suppress(EngineDied, asyncio.TimeoutError):
            await asyncio.wait_for(engine.stats(), 1)
        refused += 1
        await asyncio.sleep(0.01)
    assert refused, "meanwhile nobody waits for long"
    assert (await engine.stats()).cells_used == 0


async def test_a_model_file_that_was_replaced_is_not_loaded_again() -> None:
    same = [True]
    proxy = EngineProxy(null_config(), pool_fd=None, start_timeout_s=60, unchanged=lambda: same[0])
    await proxy.start()
    try:
        same[0] = False
        kill(proxy)
        said = ""
        while "does not start again" not in said:
            with suppress(asyncio.TimeoutError):
                said = str((await asyncio.gather(asyncio.wait_for(proxy.stats(), 1), return_exceptions=True))[0])
        assert proxy.pid is None
    finally:
        await proxy.close()


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"\xff\xff\xff\xff", id="a length beyond the limit"),
        pytest.param(LENGTH.pack(4) + b"junk", id="not msgpack"),
        pytest.param(LENGTH.pack(1000) + b"\x81", id="a frame cut short"),
        pytest.param(pack({"event": "mystery", "request": 5}), id="an unknown event"),
        pytest.param(pack({"re": 1, "err": {"type": "SystemExit", "message": ""}}), id="an unknown error"),
        pytest.param(pack({"re": [1], "ok": None}), id="an answer to no call"),
        pytest.param(pack({"re": 1, "ok": {"engine": "half an info"}}), id="half an answer"),
        pytest.param(b"", id="silence"),
    ],
)
async def test_an_engine_that_talks_nonsense_is_a_dead_engine(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    launched: list[subprocess.Popen[bytes]] = []

    def launch(socket_fd: int, pool_fd: int | None) -> subprocess.Popen[bytes]:
        talk = f"import socket; s = socket.socket(fileno={socket_fd}); s.recv(1); s.sendall({reply!r}); s.shutdown(1); s.recv(10**6); s.recv(1)"
        launched.append(subprocess.Popen([sys.executable, "-c", talk], pass_fds=[socket_fd]))
        return launched[0]

    monkeypatch.setattr(process_module, "_launch", launch)
    with pytest.raises(EngineError):
        await EngineProxy(CONFIG, pool_fd=None, start_timeout_s=START_S).start()
    assert launched[0].returncode is not None, "it was ended and reaped"


async def test_an_engine_that_does_not_load_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(socket_fd: int, pool_fd: int | None) -> subprocess.Popen[bytes]:
        wait = f"import socket; s = socket.socket(fileno={socket_fd})\nwhile s.recv(1): pass"
        return subprocess.Popen([sys.executable, "-c", wait], pass_fds=[socket_fd])

    monkeypatch.setattr(process_module, "_launch", launch)
    with pytest.raises(EngineError, match="did not load"):
        await EngineProxy(CONFIG, pool_fd=None, start_timeout_s=0.1).start()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (null_config(kind="abacus"), EngineError),
        (null_config(batch_tokens=15), EngineError),  # fewer than sequences: they could not all decode in one call
        (null_config(kind="llamacpp", model_path="/nowhere/model.gguf"), ModelError),
    ],
)
async def test_what_cannot_be_loaded_is_one_clear_line(config: EngineConfig, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        await EngineProxy(config, pool_fd=None, start_timeout_s=START_S).start()
    assert "\n" not in str(caught.value)


# --- cancel storm ---------------------------------------------------------------------------------------------------


async def test_after_a_cancel_storm_nothing_is_held(engine: EngineProxy) -> None:
    random_ = random.Random(0)

    async def live_and_be_cancelled(i: int) -> None:
        request, tokens = f"r{i}", prompt(random_.randrange(1, 400), i % 5)
        moment = random_.randrange(5)
        await engine.begin(request, NS, tokens, 100, OWNER)
        try:
            if moment == 0:
                return
            admitted = asyncio.create_task(engine.restore(request, 0, ()))
            if moment == 1:
                await asyncio.sleep(0)
                admitted.cancel()
                return
            if moment == 2:
                await engine.cancel(request)
            with suppress(RestoreError):
                await admitted
            async with aclosing(engine.run(request, greedy(100))) as events:  # type: ignore[type-var]
                async for event in events:
                    if moment == 2:
                        assert isinstance(event, Done)
                        assert event.reason is FinishReason.CANCELLED
                    if moment == 3:
                        return  # nobody listens any more
                    if moment == 4 and isinstance(event, NewTokens):
                        await engine.cancel(request)
            export = asyncio.create_task(engine.export(request, [(0, 1, i % SLOTS)]))
            await asyncio.sleep(0)
            export.cancel()
        finally:
            await engine.release(request)

    await asyncio.gather(*(live_and_be_cancelled(i) for i in range(200)))
    stats = await engine.stats()
    assert (stats.requests_running, stats.requests_waiting, stats.cells_pinned) == (0, 0, 0)
    await engine.evict()
    stats = await engine.stats()
    assert (stats.cells_used, stats.sequences_resident) == (0, 0)
    assert await completion(engine, "after", prompt(30), 20) == reference(prompt(30), 20)
    assert engine.generation == 1


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """The bare process with the null engine loaded, and our end of its socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(START_S)
    with ours, theirs:
        process = process_module._launch(theirs.fileno(), None)
        theirs.close()
        ours.sendall(pack({"op": "load", "call": 1, "config": config_to_map(CONFIG)}))
        while "re" not in (receive(ours) or {"re": "closed"}):
            pass
        yield process, ours
    process.kill()
    process.wait()


Worker = tuple[subprocess.Popen[bytes], socket.socket]
BEGIN = pack(
    {
        "op": "begin",
        "call": 2,
        "request": "r",
        "ns": NS,
        "owner": OWNER,
        "tokens": prompt(10).data,
        "reserve_tokens": ENDLESS,
    }
)


def run_frame(**sampling: object) -> bytes:
    return pack({"op": "run", "call": 3, "request": "r", "sampling": {**vars(greedy(ENDLESS)), **sampling}})


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_lives_as_long_as_its_socket(worker: Worker, busy: bool) -> None:
    process, ours = worker
    if busy:
        ours.sendall(BEGIN + run_frame())
        while "event" not in (receive(ours) or {}):
            pass
    ours.close()
    assert process.wait(START_S) == 0


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(struct.pack("<I", MAX_MESSAGE_BYTES + 1), id="too long"),
        pytest.param(LENGTH.pack(5) + b"\xdd\xff\xff\xff\xff", id="not a message"),
        pytest.param(pack({"op": "format disk", "call": 2}), id="an unknown call"),
        pytest.param(pack({"op": "stats"}), id="a call without a number"),
        pytest.param(pack({"op": "begin", "call": 2, "request": "r"}), id="half a call"),
        pytest.param(pack({"op": "detokenize", "call": 2, "tokens": b"odd"}), id="half a token"),
        pytest.param(BEGIN + run_frame(temperature="hot"), id="a setting that only computing finds wrong"),
    ],
)
def test_a_peer_that_breaks_the_protocol_ends_the_process(worker: Worker, frame: bytes) -> None:
    process, ours = worker
    ours.sendall(frame)
    assert process.wait(START_S) == 1


def descriptors(pid: int) -> list[str]:
    return sorted(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())


def proc(pid: int | None, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


@pytest.mark.parametrize("kind", ["null", "llamacpp"])
async def test_the_process_has_its_socket_the_pool_and_nothing_else_open(
    pool: tuple[int, mmap.mmap], kind: str
) -> None:
    config = CONFIG if kind == "null" else tiny_config(threads=1, batch_threads=1)
    with socket.create_server(("127.0.0.1", 0)):  # what the control process has open is not inherited
        async with running(config, pool[0]) as engine:
            pid = engine.pid
            assert pid
            if os.geteuid():
                with pytest.raises(PermissionError):
                    descriptors(pid)  # it is not dumpable: not even its own user may look
                return
            found = descriptors(pid)
            unix = proc(pid, "net/unix").split()
    (sock,) = (name for name in found if name.startswith("socket:"))
    assert sock.removeprefix("socket:[").removesuffix("]") in unix
    standard = {"/dev/null", os.readlink("/proc/self/fd/2")}
    assert set(found) - standard <= {sock, "/memfd:pool (deleted)", config.model_path}


async def test_the_process_is_told_nothing_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCTL_PASSPHRASE", "correct horse battery staple")
    async with running(CONFIG) as engine:
        if os.geteuid():
            with pytest.raises(PermissionError):
                proc(engine.pid, "environ")  # it is not dumpable: not even its own user may look
            return
        environ, limits = proc(engine.pid, "environ"), proc(engine.pid, "limits")
    names = {entry.partition("=")[0] for entry in environ.split("\0") if entry}
    assert names <= {*PASSED_ENVIRONMENT, *OPENMP}
    (core,) = (line.split() for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core[4:6] == ["0", "0"]


def test_confined_is_not_dumpable_and_dies_with_its_parent() -> None:
    ask = (
        "import ctypes; from appliance.engine.worker import confine; confine(); libc = ctypes.CDLL(None)\n"
        "death = ctypes.c_int(); libc.prctl(2, ctypes.byref(death), 0, 0, 0)\n"
        "print(libc.prctl(3, 0, 0, 0, 0), death.value)"
    )
    told = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["0", str(int(signal.SIGKILL))]


# --- llama.cpp ------------------------------------------------------------------------------------------------------


async def test_llama_cpp_dies_comes_back_and_restores(pool: tuple[int, mmap.mmap]) -> None:
    block = 16
    config = tiny_config(block_tokens=block, context_tokens=2048, max_sequences=16, threads=1, batch_threads=1)
    text = "The quick brown fox jumps over the lazy dog, twice a day."
    async with running(config, pool[0]) as engine:
        await engine.attach_pool(engine.info.layout.slot_bytes, 3)
        tokens = await engine.tokenize(text, add_special=True, parse_special=False)
        assert await engine.detokenize(tokens) == text
        assert len(tokens) > 3 * block
        await engine.begin("r", NS, tokens, 1800, OWNER)
        expected: list[int] = []
        with suppress(EngineDied):
            async for event in engine.run("r", greedy(1800)):
                assert not isinstance(event, Done), "it is killed long before"
                if isinstance(event, NewTokens):
                    expected += event.tokens
                if len(expected) == 20:
                    await engine.export("r", [(i * block, block, i) for i in range(3)])
                    kill(engine)
        await engine.release("r")
        assert await engine.begin("r", NS, tokens, 20, OWNER) == 0
        assert await engine.restore("r", 0, [(i, block, block) for i in range(3)]) == 3 * block
        await engine.release("r")
        assert await completion(engine, "again", tokens, 20) == expected[:20]
        assert engine.generation == 2
