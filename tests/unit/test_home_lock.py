"""One process at a time works on a home, and the next one hears whose turn it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from appliance.errors import AlreadyRunning
from appliance.ops.home_lock import only_one


def test_the_holder_is_named_until_it_lets_go(tmp_path: Path) -> None:
    (tmp_path / "appliance.lock").write_text("1234567890")  # of one that ended
    with only_one(tmp_path):
        with pytest.raises(AlreadyRunning, match=f"kill {os.getpid()}$") as caught, only_one(tmp_path):
            pass
        assert caught.value.pid == os.getpid()
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"x", b"12 34", b"-1", b"\xff" * 40])
def test_whoever_cannot_be_named_is_not(tmp_path: Path, content: bytes) -> None:
    """Taken, and not written down yet, or by something else: nobody is told to kill pid 0."""
    with only_one(tmp_path):
        (tmp_path / "appliance.lock").write_bytes(content)
        with pytest.raises(AlreadyRunning, match="another process is using") as caught, only_one(tmp_path):
            pass
    assert caught.value.pid is None
