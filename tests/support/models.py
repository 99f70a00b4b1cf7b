"""Model files for tests, made once per machine and source state."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from appliance.engine.base import EngineConfig
from appliance.ops import synth as synth_module
from appliance.ops import synth_shape, synth_tiny
from appliance.ops.synth import synth


def tiny_model() -> Path:
    """The `tiny` preset, cached in the temporary folder under a digest of the code that makes it."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (synth_module, synth_shape, synth_tiny))
    path = Path(tempfile.gettempdir()) / f"kvctl-tests-{hashlib.sha256(code).hexdigest()[:16]}" / "tiny.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        synth("tiny", path)
    return path


def tiny_config(**changes: object) -> EngineConfig:
    """How the engine is told to load the tiny model; threads are calibrated unless given."""
    settings: dict[str, object] = {
        "kind": "llamacpp",
        "model_path": str(tiny_model()),
        "model_sha256": bytes(32),
        "context_tokens": 4096,
        "max_sequences": 8,
        "batch_tokens": 512,
        "shared_batch_tokens": 64,
        "prefill_share": 1.0,
        "block_tokens": 256,
        "gpu_layers": 0,
        "threads": 0,
        "batch_threads": 0,
        "kv_type_k": "f16",
        "kv_type_v": "f16",
    }
    return EngineConfig(**{**settings, **changes})  # type: ignore[arg-type]
