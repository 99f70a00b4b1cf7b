"""What makes one engine's KV bytes mean the same as another's: the fingerprint.

Invariant: two contexts with equal fingerprints read each other's blocks; when in doubt they differ. Values only.
"""

from __future__ import annotations

import hashlib

from llama_cpp import llama_cpp as ll

from appliance.engine.base import EngineConfig, KVMode
from appliance.engine.llamacpp import native
from appliance.engine.llamacpp.cells import RowLayout
from appliance.types import BlockLayout, Fingerprint


def fingerprint(
    config: EngineConfig, metadata: dict[str, str], rows: RowLayout | None, mode: KVMode, layout: BlockLayout
) -> Fingerprint:
    rope = [f"{key}={value}" for key, value in sorted(metadata.items()) if ".rope." in key]
    backend = "gpu" if config.gpu_layers and ll.llama_supports_gpu_offload() else "cpu"
    shape = [
        native.build(),
        native.system_info(),
        f"kv {config.kv_type_k} {config.kv_type_v}",
        f"rows {rows}",
        f"mode {mode}",
        f"backend {backend} {config.gpu_layers if backend == 'gpu' else 0}",
        f"blocks {layout}",
    ]
    return Fingerprint(_digest([config.model_sha256.hex(), *rope]), _digest(shape))


def _digest(lines: list[str]) -> bytes:
    return hashlib.sha256("\n".join(lines).encode()).digest()
