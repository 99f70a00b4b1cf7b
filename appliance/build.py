"""The composition root: a profile becomes objects, `kvctl serve` becomes a running appliance and ends in order.

Invariant: one appliance per home (a lock file held for life); a persistent tier is only ever built around the keyring's
seals. Start order: lock, keyring, model, pool, engine, store, sockets. Stop order is the reverse: refuse new requests,
finish running ones, make every block durable, close the engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from appliance.admin import ApplianceAdmin, Place
from appliance.api.start import StartEvent, StartProgress, StartReady
from appliance.config import Profile, admin_socket, client_file
from appliance.engine.base import EngineConfig, EngineInfo, KVMode
from appliance.engine.proxy import EngineProxy
from appliance.kv.base import KVStore
from appliance.kv.null import NullStore
from appliance.kv.opening import open_store
from appliance.kv.tiers.dram import DramPool
from appliance.ops import models, synth
from appliance.ops.home_lock import only_one
from appliance.ops.init import key_file
from appliance.plan.cost import CostModel
from appliance.runtime import Limits, Runtime
from appliance.security.files import write_private
from appliance.security.keyring import Keyring
from appliance.server.app import admin_app, public_app
from appliance.server.base import ServedModel, Service
from appliance.server.listen import Bound, Listener, bind
from appliance.server.metrics import Metrics

log = logging.getLogger(__name__)

INTERRUPTED = 130
FLUSH_S = 120.0
"""Longest a stop waits for write-behind after the last request ended."""

Report = Callable[[StartEvent], None]
T = TypeVar("T")


@dataclass(frozen=True)
class ServeOptions:
    home: Path
    profile: Profile
    model: str | None
    """Name or path; None together with `synth`."""
    synth: bool
    report: Report


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 after an orderly stop. Errors of the tree in errors.py before that."""
    started_s = time.monotonic()
    with only_one(options.home):
        keyring = Keyring.open(options.home, key_file(options.home, options.profile))
        model_path, sha256 = _model(options)
        try:
            asyncio.run(_serve(options, keyring, _engine_config(options.profile, model_path, sha256), started_s))
        except _Stopped:
            return INTERRUPTED
    return 0


def _model(options: ServeOptions) -> tuple[Path, bytes]:
    def say(text: str) -> Callable[[float], None]:
        return lambda fraction: options.report(StartProgress(text=text, fraction=fraction))

    if options.profile.engine.kind == "null":
        return Path("null"), bytes(32)
    if options.synth:
        path = synth.default_model(options.home, say("writing random weights"))
    else:
        assert options.model, "the command asks for a model before it calls"
        path = models.resolve(options.home, options.model)
    return path, models.sha256(path, options.home, on_progress=say(f"checking {path.name}"))


def _engine_config(profile: Profile, model_path: Path, sha256: bytes) -> EngineConfig:
    engine = profile.engine
    return EngineConfig(
        kind=engine.kind,
        model_path=str(model_path),
        model_sha256=sha256,
        context_tokens=engine.context_tokens,
        max_sequences=engine.max_sequences,
        batch_tokens=engine.batch_tokens,
        shared_batch_tokens=engine.shared_batch_tokens,
        block_tokens=profile.kv.block_tokens,
        gpu_layers=engine.gpu_layers,
        threads=engine.threads,
        batch_threads=engine.batch_threads,
        kv_type_k=engine.kv_type_k,
        kv_type_v=engine.kv_type_v,
    )


async def _serve(options: ServeOptions, keyring: Keyring, config: EngineConfig, started_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    profile = options.profile
    async with AsyncExitStack() as stack:
        bound = bind(profile.server.host, profile.server.port, admin_socket(options.home))
        stack.callback(_close_sockets, bound)
        pool = DramPool(profile.tiers.dram.capacity, lock=profile.tiers.dram.lock)
        stack.callback(pool.close)
        name = Path(config.model_path).stem
        loading = f"loading {name}"
        engine = EngineProxy(
            config,
            pool_fd=pool.fd,
            start_timeout_s=profile.engine.start_timeout,
            on_progress=lambda fraction: options.report(StartProgress(text=loading, fraction=fraction)),
        )
        stack.push_async_callback(engine.close)
        info = await _unless_stopped(engine.start(), stop)
        options.report(StartProgress(text="opening the store"))
        tiers = profile.tiers
        store = await open_store(options.home, keyring, info.fingerprint, info.layout, pool, profile.kv, tiers.nvme)
        stack.push_async_callback(store.close)
        if store.pool is not None:
            await engine.attach_pool(store.pool.slot_bytes, store.pool.slots)
        cost = await stack.enter_async_context(_learned(options.home, info))
        limits = Limits(profile.server.max_running, profile.server.max_queue, profile.kv.store_completions)
        runtime = Runtime(engine, store, cost, limits)
        place = Place(options.home, bound.base_url, started_s, ())
        admin = ApplianceAdmin(runtime, keyring, place)
        service = _service(profile, runtime, admin, keyring, info)
        listener = Listener(bound, public_app(service), admin_app(service, admin))
        await listener.start()
        options.report(await _ready(admin, options.home, started_s))
        await stop.wait()
        draining = asyncio.create_task(runtime.drain(profile.server.drain))
        await listener.stop(profile.server.drain)
        await draining
        if not await store.flush(FLUSH_S):
            log.warning("stopped before every block was durable; what is missing will be computed again")


async def _open_store(options: ServeOptions, keyring: Keyring, info: EngineInfo, pool: DramPool) -> KVStore:
    profile = options.profile
    if not profile.kv.enabled:
        return NullStore(keyring, info.fingerprint, info.layout, "off: kv.enabled is false")
    if info.kv_mode is KVMode.NONE:
        return NullStore(keyring, info.fingerprint, info.layout, "off: this model's state cannot be cut into blocks")
    return await open_store(options.home, keyring, info.fingerprint, info.layout, pool, profile.kv, profile.tiers.nvme)


class _Stopped(Exception):
    """A stop was asked for before the appliance was ready."""


async def _unless_stopped(start: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
    starting, stopping = asyncio.ensure_future(start), asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting in done:
        return starting.result()
    starting.cancel()
    raise _Stopped


def _close_sockets(bound: Bound) -> None:
    bound.public.close()
    bound.admin.close()
    bound.admin_path.unlink(missing_ok=True)


def _service(profile: Profile, runtime: Runtime, admin: ApplianceAdmin, keyring: Keyring, info: EngineInfo) -> Service:
    model = ServedModel(
        id=info.model_name,
        created=int(time.time()),
        vocab_tokens=info.vocab_tokens,
        context_tokens=info.context_tokens,
        default_max_tokens=profile.server.default_max_tokens,
        system_fingerprint=f"fp_{info.fingerprint.digest.hex()[:12]}",
        description=info.description,
        build=info.engine,
        slots=profile.server.max_running,
    )
    return Service(
        runtime=runtime,
        model=model,
        authenticate=keyring.authenticate,
        metrics=Metrics(admin.snapshot),
        state=admin.state,
        max_body_bytes=profile.server.max_body,
    )


async def _ready(admin: ApplianceAdmin, home: Path, started_s: float) -> StartReady:
    status = await admin.status()
    return StartReady(
        pid=status.pid,
        model=status.engine.model,
        description=status.engine.description,
        context_tokens=status.engine.context_tokens,
        base_url=status.base_url,
        client_file=str(client_file(home)),
        tiers=status.tiers,
        notes=[*status.engine.notes, *(note for tier in status.tiers for note in tier.notes)],
        seconds=time.monotonic() - started_s,
    )


@asynccontextmanager
async def _learned(home: Path, info: EngineInfo) -> AsyncGenerator[CostModel, None]:
    """The cost model of this model on this box, kept in the home between starts."""
    path = home / "calibration.json"
    key = info.fingerprint.digest.hex()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        cost = CostModel.from_json(saved[key])
    except (OSError, ValueError, KeyError, TypeError):
        saved = {}
        cost = CostModel.calibrated(info.prefill_tokens_per_s, info.decode_step_s)
    yield cost
    saved[key] = cost.to_json()
    try:
        write_private(path, json.dumps(saved).encode())
    except OSError as error:
        log.warning("calibration not kept: %s", error.strerror)
