"""The llama.cpp engine. `create` loads a model; llama_cpp is imported no earlier."""

from __future__ import annotations

from collections.abc import Callable

from appliance.engine.base import Engine, EngineConfig


def create(config: EngineConfig, on_progress: Callable[[float], None]) -> Engine:
    """ModelError or EngineError, each one clear line, if the model cannot be loaded or does not fit."""
    from appliance.engine.llamacpp.engine import LlamaCppEngine

    return LlamaCppEngine(config, on_progress)
