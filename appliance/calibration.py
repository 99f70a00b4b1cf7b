"""What time costs here, before the first request: measured at the first start of a model on a box, and kept in the home.

Depth costs nothing to reach: the same slot of zeros is restored as every block of a prompt in a namespace that nobody can
ask for, then a chunk is computed there and a few tokens are generated. Afterwards nothing of it is left in cells.

Invariant: a start is held up for at most about BUDGET_S, and by milliseconds when the model is small; what cannot be
measured is learned from requests instead. Threading: event loop; the medium and the cipher are tried in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from appliance.engine.base import EngineInfo
from appliance.engine.client import Done, EngineClient, Prefilled
from appliance.errors import EngineDied, EngineError, RestoreError
from appliance.kv.tiers.files import aligned_buffer, opened, read_all, supports_direct, write_all
from appliance.plan.cost import CostModel
from appliance.plan.hardware import Medium, box, chunk_tokens, depths
from appliance.security.files import write_private
from appliance.security.seal import Subkey
from appliance.types import SamplingParams, Tier, Tokens

log = logging.getLogger(__name__)

BUDGET_S = 15.0
"""What is not measured by then is left to requests."""
DECODED_TOKENS = 4
KEEP_S = 60.0
"""How often what was learned is written."""
KEPT_MODELS = 64
SCRATCH_BYTES = 8 * 2**20
SCRATCH_READ_BYTES = 2**20
SMALL_READ_BYTES = 4096
ROOM = 4
"""The scratch file is written only where so many times its size is free."""


@asynccontextmanager
async def learned(home: Path, info: EngineInfo) -> AsyncGenerator[tuple[CostModel, Callable[[], None] | None], None]:
    """The cost model of this model on this box, written every minute and at the end. If it was not measured before, also
    what writes it at once. Whatever cannot be read is measured again."""
    path = home / "calibration.json"
    key = f"{info.fingerprint.digest.hex()} {box()} {info.batch_threads}"
    saved = _read(path)
    try:
        cost, measured = CostModel.from_json(saved[key]), True
    except (ValueError, KeyError, TypeError, AttributeError):
        cost, measured = CostModel.calibrated(info.prefill_tokens_per_s, info.decode_step_s), False
    saved.pop(key, None)
    saved = dict(list(saved.items())[-KEPT_MODELS:])

    def write(data: bytes) -> None:
        try:
            write_private(path, data)
        except OSError as error:
            log.warning("calibration not kept: %s", error.strerror)

    def as_json() -> bytes:
        return json.dumps({**saved, key: cost.to_json()}).encode()

    def keep() -> None:
        write(as_json())

    async def keep_often() -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            await asyncio.to_thread(write, as_json())  # read here: what is learned changes on this thread

    keeping = asyncio.create_task(keep_often())
    try:
        yield cost, None if measured else keep
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        keep()


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


async def calibrate(
    engine: EngineClient, cost: CostModel, folder: Path | None, progress: Callable[[float], None]
) -> None:
    """Measure into `cost`. The engine has its pool, whose slots are zeros yet; `folder`: where the nvme tier is, if any."""
    until_s = time.monotonic() + BUDGET_S
    info = engine.info
    chunk, steps = chunk_tokens(info.prefill_tokens_per_s), depths(info.context_tokens, info.layout.block_tokens)
    for n, depth in enumerate(steps):
        progress(n / (len(steps) + 1))
        began_s = time.monotonic()
        try:
            if not await _at_depth(engine, cost, depth, chunk):
                break
        except EngineDied:
            raise
        except EngineError as error:
            log.warning("not measured at depth %d: %s", depth, error)
            break
        if time.monotonic() + 2 * (time.monotonic() - began_s) > until_s:
            break
    await engine.evict()
    progress(len(steps) / (len(steps) + 1))
    if folder is not None and Tier.DRAM in cost.loads:
        try:
            medium = await asyncio.to_thread(_medium, folder)
        except OSError as error:
            log.warning("the nvme tier was not measured, requests will tell: %s", error.strerror)
            return
        for nbytes in (info.layout.slot_bytes, 16 * info.layout.slot_bytes):
            cost.saw_load({Tier.NVME: nbytes}, medium.load_s(nbytes) + cost.load_s(Tier.DRAM, nbytes))


async def _at_depth(engine: EngineClient, cost: CostModel, depth: int, chunk: int) -> bool:
    """One chunk and a few tokens behind `depth` tokens of nothing. False if the engine takes no such blocks."""
    block = engine.info.layout.block_tokens
    request, ns = f"calibration-{depth}", os.urandom(32)
    prompt = Tokens.of([1] * (depth + chunk))
    await engine.begin(request, ns, prompt, DECODED_TOKENS + 1, ns)
    try:
        await engine.restore(request, 0, ())
        if depth:
            began_s = time.perf_counter()
            try:
                await engine.restore(request, 0, [(0, block, block)] * (depth // block))
            except RestoreError:
                return False
            nbytes = depth // block * engine.info.layout.payload_bytes(block)
            cost.saw_load({Tier.DRAM: nbytes}, time.perf_counter() - began_s)
        async for event in engine.run(request, SamplingParams(DECODED_TOKENS + 1, temperature=0, ignore_eos=True)):
            if isinstance(event, Prefilled) and event.prefill_tokens == chunk:
                cost.saw_prefill(depth, depth + chunk, event.prefill_s)
            elif isinstance(event, Done) and event.completion_tokens > 1:
                cost.saw_decode(depth + chunk, event.decode_s / (event.completion_tokens - 1))
    finally:
        with suppress(EngineDied):
            await engine.release(request)
    return True


def _medium(folder: Path) -> Medium:
    """Read a scratch file of the folder the way the tier reads its segments. OSError if that cannot be done. Blocking."""
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < ROOM * SCRATCH_BYTES:
        raise OSError(28, "the disk is full")
    path = folder / f".calibration-{os.getpid()}"
    flags = os.O_DIRECT if supports_direct(folder) else 0
    buffer = aligned_buffer(SCRATCH_READ_BYTES)
    try:
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flags) as fd:
            for offset in range(0, SCRATCH_BYTES, SCRATCH_READ_BYTES):
                write_all(fd, buffer, offset)
            os.fsync(fd)
            small_s = min(_timed(lambda n=n: read_all(fd, buffer[:SMALL_READ_BYTES], n << 20)) for n in range(4))  # type: ignore[misc]
            began_s = time.perf_counter()
            for offset in range(0, SCRATCH_BYTES, SCRATCH_READ_BYTES):
                read_all(fd, buffer, offset)
            read_s = time.perf_counter() - began_s
    finally:
        path.unlink(missing_ok=True)
    sealed = memoryview(bytearray(SCRATCH_READ_BYTES + 16))
    cipher, nonce = Subkey(os.urandom(32)), bytes(12)
    n_sealed = cipher.seal_into(nonce, buffer, b"", sealed)
    open_s = min(_timed(lambda: cipher.open_into(nonce, sealed[:n_sealed], b"", buffer)) for _ in range(3))
    return Medium(small_s, SCRATCH_BYTES / read_s, SCRATCH_READ_BYTES / open_s)


def _timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s
