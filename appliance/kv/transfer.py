"""The threads that move bytes between tiers. Loads go before stores; each thread lends its job one aligned buffer.

Invariant: a job runs to its end or raises; nothing is dropped while the pool is open. Tiers are synchronous, so this is
the only place of the store that knows threads. `submit` may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum
from typing import Any, TypeVar

from appliance.kv.tiers.files import aligned_buffer

T = TypeVar("T")


class Priority(IntEnum):
    LOAD = 0
    STORE = 1


class TransferPool:
    def __init__(self, threads: int, buffer_bytes: int) -> None:
        self.threads = threads
        self.buffer_bytes = buffer_bytes
        self._queues: tuple[deque[Callable[[memoryview], None]], ...] = tuple(deque() for _ in Priority)
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kv-transfer-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, priority: Priority, job: Callable[[memoryview], T]) -> Future[T]:
        """Run job(buffer) on one of the threads; `buffer` is its own until it returns."""
        future: Future[T] = Future()

        def run(buffer: memoryview) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = job(buffer)
            except BaseException as error:  # noqa: BLE001 - it is the waiter's to decide
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._wake:
            assert not self._closing
            self._queues[priority].append(run)
            self._wake.notify()
        return future

    def close(self) -> None:
        """Waits for what was submitted."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Callable[[memoryview], Any] | None:
        with self._wake:
            while True:
                for queue in self._queues:
                    if queue:
                        return queue.popleft()
                if self._closing:
                    return None
                self._wake.wait()

    def _work(self) -> None:
        buffer = aligned_buffer(self.buffer_bytes)
        while (run := self._next()) is not None:
            run(buffer)
            del run  # it holds views of slots
