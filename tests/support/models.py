"""Model files for tests, made once per machine and source state."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

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
