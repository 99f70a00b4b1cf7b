"""Keeping what a process holds in memory out of core dumps and debuggers. Linux; elsewhere only the core limit is set."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def undumpable() -> None:
    """No core dump, and no ptrace by another process of this user (prctl(2), PR_SET_DUMPABLE)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
