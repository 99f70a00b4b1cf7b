"""Loading and freeing llama.cpp objects through its C API, and what it says meanwhile.

Owns the process-wide log callback: llama.cpp's messages go nowhere but into the last few error lines, which only a
failed load shows (they may not name prompt content then, as there is none yet). Threading: one thread at a time.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as ll

from appliance.engine.base import EngineConfig, Pooling
from appliance.errors import EngineError, ModelError

KV_TYPES = {
    "f32": ll.GGML_TYPE_F32,
    "f16": ll.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16, which the binding does not name
    "q8_0": ll.GGML_TYPE_Q8_0,
    "q4_0": ll.GGML_TYPE_Q4_0,
}
MAX_UBATCH_TOKENS = 512

_ERROR_LEVEL = 4
_errors: deque[str] = deque(maxlen=8)


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _data: Any) -> None:
    if level == _ERROR_LEVEL:
        _errors.append(text.decode("utf-8", "replace").strip())


def build() -> str:
    """Name and build of the engine."""
    return f"llama.cpp {llama_cpp.__version__}"


def system_info() -> str:
    return str(ll.llama_print_system_info().decode("utf-8", "replace"))


def load_model(config: EngineConfig, on_progress: Callable[[float], None]) -> Any:
    """Weights of a GGUF file. ModelError with llama.cpp's own reason."""
    path = Path(config.model_path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file")

    @ll.llama_progress_callback  # type: ignore[untyped-decorator]
    def progress(fraction: float, _data: Any) -> bool:
        on_progress(fraction)
        return True

    ll.llama_log_set(_collect, ctypes.c_void_p(0))
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    params.n_gpu_layers = config.gpu_layers
    params.load_mode = ll.LLAMA_LOAD_MODE_MMAP
    params.progress_callback = progress
    # llama.cpp's AMX kernels load a tile configuration that the compiler may leave half written, and die of it
    # (ggml-org/llama.cpp#20824, #26954). Repacked weights are the only ones they take.
    params.use_extra_bufts = "AMX_INT8 = 1" not in system_info()
    _errors.clear()
    model = ll.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(f"{path}: llama.cpp cannot load it: {_reason()}")
    if not ll.llama_model_has_decoder(model) or ll.llama_model_has_encoder(model):
        ll.llama_model_free(model)
        raise ModelError(f"{path}: not a text generation model")
    return model


def new_context(model: Any, config: EngineConfig) -> Any:
    """Cells for all sequences in one pool, flash attention on: rows of V stay per token."""
    params = ll.llama_context_default_params()
    params.n_ctx = config.context_tokens
    params.n_batch = config.batch_tokens
    params.n_ubatch = min(config.batch_tokens, MAX_UBATCH_TOKENS)
    params.n_seq_max = config.max_sequences
    params.kv_unified = True
    params.pooling_type = ll.LLAMA_POOLING_TYPE_NONE  # chunks are pooled by embeddings.py
    params.swa_full = True
    params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = KV_TYPES[config.kv_type_k]
    params.type_v = KV_TYPES[config.kv_type_v]
    params.offload_kqv = config.gpu_layers != 0
    params.no_perf = True
    _errors.clear()
    context = ll.llama_init_from_model(model, params)
    if not context:
        raise EngineError(f"no context of {config.context_tokens} tokens for this model: {_reason()}")
    return context


def metadata(model: Any) -> dict[str, str]:
    """The GGUF's scalar metadata as llama.cpp prints it."""
    found = {}
    for i in range(ll.llama_model_meta_count(model)):
        key = _string(partial(ll.llama_model_meta_key_by_index, model, i))
        found[key] = _string(partial(ll.llama_model_meta_val_str_by_index, model, i))
    return found


def pooling(metadata: Mapping[str, str]) -> Pooling:
    """How the model's authors pool; the mean if they do not say."""
    said = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    return {"2": Pooling.FIRST, "3": Pooling.LAST}.get(said or "", Pooling.MEAN)


def description(model: Any) -> str:
    return _string(partial(ll.llama_model_desc, model))


def _string(call: Callable[[Any, int], int]) -> str:
    """A string of a snprintf-like call, whatever its length."""
    buffer = ctypes.create_string_buffer(256)
    needed = call(buffer, len(buffer))
    if needed >= len(buffer):
        buffer = ctypes.create_string_buffer(needed + 1)
        call(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def _reason() -> str:
    """The innermost error line, which llama.cpp logs first."""
    line = _errors[0] if _errors else "no reason given"
    return re.sub(r".*error loading model[^:]*: ", "", line)
