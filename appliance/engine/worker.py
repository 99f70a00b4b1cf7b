"""The engine process: `python -m appliance.engine.worker --socket-fd N [--pool-fd M]`.

It has no keys, no network and no files but the model; it lives exactly as long as its end of the socket. Invariant: every
call is answered once, and a peer that breaks the protocol ends the process rather than confuses it.

Threading: the main thread computes; one thread reads the socket, and answers what only reads the books; text calls run on
a small pool, so that tokenising a long prompt delays nobody. Any of them may send: a lock keeps frames whole.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import mmap
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, NoReturn

from appliance.engine import wire
from appliance.engine.base import Engine, EngineConfig
from appliance.engine.client import Event
from appliance.engine.pace import Pace
from appliance.engine.protocol import pack
from appliance.engine.request import Failed
from appliance.engine.roster import Roster
from appliance.engine.scheduler import Scheduler
from appliance.errors import EngineError, KvctlError
from appliance.types import Tokens
from appliance.undumpable import undumpable

ENGINES = {"llamacpp": "appliance.engine.llamacpp", "null": "appliance.engine.null"}
TEXT_THREADS = 2
TEXT_STACK_BYTES = 64 * 2**20
"""Tokenizers and templates recurse with their input; address space is cheap."""

_PR_SET_PDEATHSIG = 1


class Pool:
    """The control process's slots, mapped."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._memory: memoryview | None = None
        self._slot_bytes = 0

    def attach(self, slot_bytes: int, slots: int) -> None:
        size = slot_bytes * slots
        if self._fd is None or size <= 0 or os.fstat(self._fd).st_size < size:
            raise EngineError("the inherited pool does not hold that many slots")
        self._memory, self._slot_bytes = memoryview(mmap.mmap(self._fd, size)), slot_bytes

    def slot(self, index: int, nbytes: int) -> memoryview:
        start = index * self._slot_bytes
        if self._memory is None or index < 0 or start >= len(self._memory) or not 0 <= nbytes <= self._slot_bytes:
            raise EngineError("no such slot")
        return self._memory[start : start + nbytes]


class Worker:
    def __init__(self, connection: socket.socket, pool: Pool) -> None:
        self._connection = connection
        self._pool = pool
        self._send_lock = threading.Lock()
        self._loaded = threading.Event()
        self._text = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._calls: dict[str, Callable[[dict[str, Any]], Any]] = {
            "pool": lambda m: self._pool.attach(m["slot_bytes"], m["slots"]),
            "tokenize": self._tokenize,
            "render": self._render,
            "detokenize": self._detokenize,
            "resident": lambda m: self._roster.resident(m["ns"], Tokens(m["tokens"])),
            "begin": lambda m: self._roster.begin(
                m["request"], m["ns"], Tokens(m["tokens"]), m["reserve_tokens"], m["owner"]
            ),
            "prefill": lambda m: self._scheduler.prefill(m["request"], m["stop"]),
            "restore": lambda m: self._scheduler.restore(m["request"], m["start"], _triples(m["blocks"])),
            "run": lambda m: self._scheduler.run_request(m["request"], wire.sampling_from_map(m["sampling"])),
            "preempt": lambda m: self._scheduler.preempt(m["request"]),
            "park": lambda m: self._scheduler.park(m["request"]),
            "export": lambda m: self._scheduler.export(m["request"], _triples(m["blocks"])),
            "embed": lambda m: self._scheduler.embed(m["request"]),
            "release": lambda m: self._scheduler.release(m["request"]),
            "cancel": lambda m: self._scheduler.cancel(m["request"]),
            "stats": lambda m: asdict(self._roster.stats()),
            "evict": lambda m: self._scheduler.evict(),
        }

    def serve(self) -> None:
        """Load, then compute for as long as the process lives."""
        message = wire.receive(self._connection)
        if message is None:
            return  # the control process stopped before it asked for anything
        if message["op"] != "load":
            raise ValueError("the first call is load")
        config = wire.config_from_map(message["config"])
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            self._engine = load_engine(config, self._progress)
        except KvctlError as error:
            self._send({"re": message["call"], "err": wire.error_to_map(error)})
            return
        self._roster = Roster(self._engine, slot=self._pool.slot, emit=self._emit)
        pace = Pace(config.batch_tokens, config.shared_batch_tokens, config.prefill_share)
        self._scheduler = Scheduler(self._engine, self._roster, pace)
        self._loaded.set()
        self._send({"re": message["call"], "ok": wire.info_to_map(self._engine.info)})
        self._scheduler.run()

    def _read(self) -> NoReturn:
        """Handle calls until the peer closes. Nothing here outlives the socket, so leaving needs no tidying."""
        status = 1
        try:
            while message := wire.receive(self._connection):
                self._handle(message)
            status = 0
        except OSError:
            status = 0
        except wire.MALFORMED as error:
            _report(type(error), error, error.__traceback__)
        finally:
            os._exit(status)

    def _handle(self, message: dict[str, Any]) -> None:
        call = message["call"]
        self._loaded.wait()
        try:
            value = self._calls[message["op"]](message)
        except KvctlError as error:
            self._send({"re": call, "err": wire.error_to_map(error)})
            return
        if isinstance(value, Future):
            value.add_done_callback(lambda done: self._answer(call, done))
        else:
            self._send({"re": call, "ok": value})

    def _answer(self, call: int, done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            self._send({"re": call, "ok": done.result()})
        elif isinstance(error, KvctlError):
            self._send({"re": call, "err": wire.error_to_map(error)})
        else:
            _report(type(error), error, error.__traceback__)
            self._send({"re": call, "err": wire.error_to_map(EngineError("internal error"))})

    def _tokenize(self, message: dict[str, Any]) -> Future[bytes]:
        text, special, parse = message["text"], message["add_special"], message["parse_special"]
        return self._text.submit(
            lambda: Tokens.of(self._engine.tokenize(text, add_special=special, parse_special=parse)).data
        )

    def _render(self, message: dict[str, Any]) -> Future[bytes]:
        messages, tools, options = message["messages"], message["tools"], message["options"]
        return self._text.submit(lambda: Tokens.of(self._engine.render(messages, tools=tools, options=options)).data)

    def _detokenize(self, message: dict[str, Any]) -> Future[str]:
        ids = Tokens(message["tokens"]).ids()
        return self._text.submit(lambda: b"".join(map(self._engine.piece, ids)).decode("utf-8", "replace"))

    def _emit(self, request: str, event: Event | Failed) -> None:
        self._send(wire.event_to_map(request, event))

    def _progress(self, fraction: float) -> None:
        self._send({"event": "progress", "fraction": fraction})

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError), self._send_lock:  # if the control process is gone, the reader ends this one
            self._connection.sendall(pack(message))


def load_engine(config: EngineConfig, on_progress: Callable[[float], None]) -> Engine:
    if config.kind not in ENGINES:
        raise EngineError("unknown kind of engine")
    if config.batch_tokens < config.max_sequences:
        raise EngineError("engine.batch_tokens is below engine.max_sequences: one batch must hold a token of each")
    engine: Engine = importlib.import_module(ENGINES[config.kind]).create(config, on_progress)
    return engine


def confine() -> None:
    """No core dump, no debugger, no life after the parent; Ctrl-C and a hang-up are the control process's to handle."""
    undumpable()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(prog="appliance.engine.worker")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--pool-fd", type=int)
    args = parser.parse_args()
    confine()
    sys.excepthook = _report
    threading.excepthook = lambda args: _report(args.exc_type, args.exc_value, args.exc_traceback)
    threading.stack_size(TEXT_STACK_BYTES)
    Worker(socket.socket(fileno=args.socket_fd), Pool(args.pool_fd)).serve()


def _triples(blocks: list[Any]) -> list[tuple[int, int, int]]:
    return [(int(a), int(b), int(c)) for a, b, c in blocks]


def _report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Where it happened, never what was said: an exception's text may quote a prompt."""
    where = traceback.extract_tb(trace)[-1:] or [traceback.FrameSummary("?", 0, "?")]
    print(f"engine: {kind.__name__} at {where[0].filename}:{where[0].lineno}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
