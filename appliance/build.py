"""The composition root: a profile becomes objects, `kvctl serve` becomes a running appliance and ends in order.

Invariant: one appliance per home (a lock file held for life); a persistent tier is only ever built around the keyring's
seals. Start order: lock, keyring, sockets, model, pool, engine, store. Stop order: refuse new requests, finish running ones,
make every block durable, then the start's order backwards. The sockets answer all the while.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from appliance.admin import ApplianceAdmin
from appliance.anticipate import Anticipation
from appliance.api.control import Loading
from appliance.api.serve import Draining, ServeEvent, StartProgress, StartReady
from appliance.calibration import calibrate, learned
from appliance.config import Profile, admin_socket, client_file
from appliance.engine.base import EngineConfig, EngineInfo, KVMode
from appliance.engine.proxy import EngineProxy
from appliance.figures import Place, loading_status
from appliance.kv.base import KVStore
from appliance.kv.null import NullStore
from appliance.kv.opening import open_store, store_folder
from appliance.kv.tiers.dram import DramPool
from appliance.ops import models, synth
from appliance.ops.home_lock import only_one
from appliance.ops.init import follow, key_file
from appliance.plan.cost import CostModel
from appliance.prefetch import Prefetches
from appliance.runtime import Limits, Runtime
from appliance.security.keyring import Keyring
from appliance.server import loading
from appliance.server.app import admin_app, public_app
from appliance.server.base import ServedModel, Service
from appliance.server.listen import Bound, Listener, bind
from appliance.server.metrics import Metrics
from appliance.stop import Signals, Stopped, unless
from appliance.undumpable import undumpable

log = logging.getLogger(__name__)

INTERRUPTED = 130
GRACE_S = 2.0
"""How long a stop waits for the last bytes of responses."""
FLUSH_S = 120.0
"""How long it waits for write-behind after the last request ended."""
HURRIED_FLUSH_S = 5.0
"""The same after a second signal."""

BODY_BYTES, BODY_BYTES_PER_TOKEN = 2 * 2**20, 32
"""A body beyond this holds no prompt that fits the context, and reading it would hold up every stream."""

Report = Callable[[ServeEvent], None]


@dataclass(frozen=True)
class ServeOptions:
    home: Path
    profile: Profile
    model: str | None
    """Name or path; None together with `synth`."""
    synth: bool
    report: Report


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP. Errors of the tree in errors.py before it is ready.

    Returns 0 after an orderly stop; INTERRUPTED if a second signal cut it short, or SIGINT came before it was ready.
    """
    started_s = time.monotonic()
    undumpable()
    with only_one(options.home):
        keyring = Keyring.open(options.home, key_file(options.home, options.profile))
        return asyncio.run(_serve(options, keyring, started_s))


async def _serve(options: ServeOptions, keyring: Keyring, started_s: float) -> int:
    signals, progress, server = Signals(), _Progress(options.report), options.profile.server
    async with AsyncExitStack() as stack:
        bound = bind(server.host, server.port, admin_socket(options.home))
        stack.callback(bound.close)
        place = Place(options.home, bound.base_url, started_s, _exposure(bound))

        def now() -> Loading:
            return loading_status(place, progress.step)

        listener = Listener(bound, loading.public_app(now), loading.admin_app(now))
        await listener.start()
        stack.push_async_callback(listener.stop, GRACE_S)
        try:
            start = _start(options, keyring, place, stack, progress, signals)
            runtime, admin, service = await unless(signals.stop, start)
        except Stopped:
            return INTERRUPTED if signals.first is signal.SIGINT else 0
        listener.switch(public_app(service), admin_app(service, admin))
        progress.end()
        gc.collect()
        gc.freeze()  # what the start made lives to the end, up to millions of block names: nothing to look through
        follow(options.home, bound.base_url)
        options.report(await _ready(admin, options.home, started_s))
        await signals.stop.wait()
        with suppress(OSError):  # nobody reads it any more
            options.report(Draining(requests=runtime.running + runtime.waiting))
        try:
            await unless(signals.again, _wind_down(runtime, server.drain, FLUSH_S))
        except Stopped:
            await _wind_down(runtime, 0, HURRIED_FLUSH_S)
            return INTERRUPTED
    return 0


async def _start(
    options: ServeOptions,
    keyring: Keyring,
    place: Place,
    stack: AsyncExitStack,
    progress: _Progress,
    signals: Signals,
) -> tuple[Runtime, ApplianceAdmin, Service]:
    """Everything behind the sockets. What has to be closed is on the stack as soon as it exists."""
    profile, dram = options.profile, options.profile.tiers.dram

    def step(text: str) -> Callable[[float], None]:
        def advance(fraction: float) -> None:
            if signals.stop.is_set():
                raise Stopped  # ends the thread that works on the file
            progress(text, fraction)

        return advance

    model_path, before, sha256 = await asyncio.to_thread(_model, options, step)
    pool: DramPool | None = None
    if profile.kv.enabled:
        progress("reserving memory")
        pool = await asyncio.to_thread(DramPool, dram.capacity, lock=dram.lock)
        stack.callback(pool.close)
    engine = EngineProxy(
        _engine_config(profile, model_path, sha256),
        pool_fd=pool.fd if pool else None,
        start_timeout_s=profile.engine.start_timeout,
        on_progress=lambda fraction: progress(f"loading {model_path.stem}", fraction),
        unchanged=lambda: _state(model_path) == before,
    )
    stack.push_async_callback(engine.close)
    progress(f"loading {model_path.stem}")
    info = await engine.start()
    progress("opening the store")
    cost, keep = await stack.enter_async_context(learned(options.home, info))
    store = await _open_store(options, keyring, info, pool, cost)
    stack.push_async_callback(store.close)
    if store.pool is not None:
        await engine.attach_pool(store.pool.slot_bytes, store.pool.slots)
        if keep is not None:
            nvme = profile.tiers.nvme
            folder = store_folder(options.home, nvme) if nvme.enabled else None
            await calibrate(engine, cost, folder, lambda fraction: progress("measuring this box", fraction))
            await asyncio.to_thread(keep)
    limits = Limits(
        profile.server.max_running, profile.server.max_queue, profile.kv.store_completions, profile.engine.prefill_share
    )
    runtime = Runtime(engine, store, cost, limits)
    anticipation = Anticipation(runtime, _prefetch_slots(profile, store))
    stack.push_async_callback(_end, asyncio.create_task(anticipation.run()))
    admin = ApplianceAdmin(runtime, anticipation, keyring, place)
    return runtime, admin, _service(profile, runtime, admin, keyring, info, before)


def _prefetch_slots(profile: Profile, store: KVStore) -> int:
    """Slots that automatic prefetch may hold: the rest is for loads and exports."""
    if store.pool is None:
        return 0
    budget_bytes = profile.kv.prefetch_budget.of(store.pool.slots * store.pool.slot_bytes)
    return min(budget_bytes // store.pool.slot_bytes, store.pool.slots // 2)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _model(
    options: ServeOptions, step: Callable[[str], Callable[[float], None]]
) -> tuple[Path, tuple[int, ...], bytes]:
    """The model file, its state before it was read, and its SHA-256. Blocking."""
    if options.profile.engine.kind == "null":
        return Path("null"), (), bytes(32)
    if options.synth:
        path = synth.default_model(options.home, step("writing random weights"))
    else:
        assert options.model, "the command asks for a model before it calls"
        path = models.resolve(options.home, options.model)
    before = _state(path)
    return path, before, models.sha256(path, options.home, on_progress=step(f"checking {path.name}"))


def _state(model_path: Path) -> tuple[int, ...]:
    """What changes when the file is replaced or written to: modified (Unix ns), inode, bytes. Empty if there is none."""
    try:
        found = model_path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size


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
        prefill_share=engine.prefill_share,
        block_tokens=profile.kv.block_tokens,
        gpu_layers=engine.gpu_layers,
        threads=engine.threads,
        batch_threads=engine.batch_threads,
        kv_type_k=engine.kv_type_k,
        kv_type_v=engine.kv_type_v,
    )


async def _open_store(
    options: ServeOptions, keyring: Keyring, info: EngineInfo, pool: DramPool | None, cost: CostModel
) -> KVStore:
    profile = options.profile
    if pool is None:
        return NullStore(keyring, info.fingerprint, info.layout, "off: kv.enabled is false")
    if info.kv_mode is KVMode.NONE:
        return NullStore(keyring, info.fingerprint, info.layout, "off: this model's state cannot be cut into blocks")
    return await open_store(
        options.home,
        keyring,
        info.fingerprint,
        info.layout,
        pool,
        profile.kv,
        profile.tiers.nvme,
        lambda position: cost.prefill_s(position, position + 1),
    )


async def _wind_down(runtime: Runtime, drain_s: float, flush_s: float) -> None:
    """Both sockets answer meanwhile: that the appliance is stopping, and how far it is."""
    await runtime.drain(drain_s)
    if not await runtime.store.flush(flush_s):
        log.warning("stopped before every block was durable; what is missing will be computed again")


class _Progress:
    """What the start is doing: reported as it changes, each percent once, and kept for whoever asks meanwhile."""

    def __init__(self, report: Report) -> None:
        self.step = StartProgress(text="starting")
        self._report = report

    def end(self) -> None:
        """Ready: a later start of the engine is not the appliance's."""
        self._report = lambda step: None

    def __call__(self, text: str, fraction: float | None = None) -> None:
        step = StartProgress(text=text, fraction=None if fraction is None else round(fraction, 2))
        if step != self.step:
            self.step = step
            self._report(step)


def _exposure(bound: Bound) -> tuple[str, ...]:
    """What to know when others can reach the public socket."""
    host, port = bound.public.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return ()
    return (
        f"{host} port {port} is plain HTTP: prompts and API keys can be read on the network. Put a TLS proxy in front, "
        f"or listen on 127.0.0.1 and reach it with: ssh -L {port}:127.0.0.1:{port} THIS-BOX",
    )


def _service(
    profile: Profile,
    runtime: Runtime,
    admin: ApplianceAdmin,
    keyring: Keyring,
    info: EngineInfo,
    state: tuple[int, ...],
) -> Service:
    model = ServedModel(
        id=info.model_name,
        created=state[0] // 10**9 if state else 0,
        vocab_tokens=info.vocab_tokens,
        context_tokens=info.context_tokens,
        default_max_tokens=profile.server.default_max_tokens,
        system_fingerprint=f"fp_{info.fingerprint.digest.hex()[:12]}",
        description=info.description,
        build=info.engine,
        slots=profile.server.max_running,
        tool_format=info.tool_format,
        grammars=info.grammars,
        embedding_width=info.embedding_width,
    )
    return Service(
        runtime=runtime,
        prefetches=Prefetches(runtime),
        model=model,
        authenticate=keyring.authenticate,
        operator=keyring.tenants()[0].name,
        metrics=Metrics(admin.snapshot),
        state=admin.state,
        max_body_bytes=min(profile.server.max_body, BODY_BYTES + BODY_BYTES_PER_TOKEN * info.context_tokens),
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
