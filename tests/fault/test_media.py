"""A disk that is full, or fails: answers go on, from memory or computed, and what the disk missed is written once it works."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from appliance.api.control import PromptRef
from kvctl.client import AdminClient
from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, Answer, Appliance, appliance, kvctl, prompt, text, until
from tests.support.disk import small_disk
from tests.support.rigged import RIGGED, fault

PROMPT_TOKENS = BLOCK * 4 + 9
WARM_TOKENS = PROMPT_TOKENS - 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with appliance(tmp_path_factory.mktemp("home"), program=RIGGED) as running:
        yield running


def same(served: Appliance, tokens: list[int], cold: Answer, **sources: int) -> None:
    again = served.complete(tokens)
    assert again.text == cold.text
    assert {tier: n for tier, n in again.sources.items() if n and tier != "computed"} == sources


def degraded(served: Appliance) -> bool:
    return served.tier("nvme").state == "degraded"


def restart(served: Appliance) -> None:
    assert served.stop() == ExitCode.OK
    served.start()


def check_nothing_failed(served: Appliance) -> None:
    statuses = [
        line for line in served.get("/metrics").text.splitlines() if line.startswith("kvctl_http_responses_total")
    ]
    assert statuses
    assert all('status="200"' in line for line in statuses)
    assert served.status().engine.restarts == 0


@pytest.mark.parametrize(
    ("op", "error"), [("reserve", "full"), ("write", "full"), ("write", "io"), ("sync", "io")], ids=lambda value: value
)
def test_what_cannot_be_written_stays_in_memory_and_is_written_later(served: Appliance, op: str, error: str) -> None:
    number = ["reserve", "write", "sync"].index(op) * 2 + (error == "io")
    before = served.metrics()
    fault(served.home, **{op: error})
    tokens = prompt(number, PROMPT_TOKENS)
    cold = served.complete(tokens)
    until(lambda: degraded(served), "the disk is seen to fail")
    same(served, tokens, cold, hbm=WARM_TOKENS)
    served.forget("hbm")
    same(served, tokens, cold, dram=WARM_TOKENS)
    shown = kvctl(served.home, "status")
    assert (shown.code, "degraded" in shown.out) == (ExitCode.OK, True)
    assert served.metrics()["kvctl_store_failures_total"] > before.get("kvctl_store_failures_total", 0)
    fault(served.home)
    until(lambda: not degraded(served), "the disk is tried again")
    check_nothing_failed(served)
    restart(served)
    same(served, tokens, cold, nvme=WARM_TOKENS)


def test_what_cannot_be_read_is_computed_until_the_disk_works_again(served: Appliance) -> None:
    first, second = prompt(10, PROMPT_TOKENS), prompt(11, PROMPT_TOKENS)
    cold = [served.complete(tokens) for tokens in (first, second)]
    restart(served)
    before = served.metrics()
    fault(served.home, read="io")
    same(served, first, cold[0])
    assert degraded(served)
    assert served.metrics()["kvctl_tier_failures_total"] > before.get("kvctl_tier_failures_total", 0)
    same(served, first, cold[0], hbm=WARM_TOKENS)
    fault(served.home)
    with AdminClient(served.home) as admin:
        until(lambda: admin.inspect(PromptRef(prompt=text(second))).cached_tokens > 0, "the disk is tried again")
    same(served, second, cold[1], nvme=WARM_TOKENS)
    assert not degraded(served)
    check_nothing_failed(served)
    assert kvctl(served.home, "verify").code == ExitCode.OK


@contextmanager
def file_size_limit(served: Appliance, folder: Path) -> Iterator[None]:
    """Files of the control process, index included, may not grow beyond a page."""
    assert served.child.pid is not None
    was = resource.prlimit(served.child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.child.pid, resource.RLIMIT_FSIZE, (4096, was[1]))
    yield
    resource.prlimit(served.child.pid, resource.RLIMIT_FSIZE, was)


@contextmanager
def filled_up(served: Appliance, folder: Path) -> Iterator[None]:
    """Somebody else's file takes all there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)
    yield
    filler.unlink()


@contextmanager
def own_folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"


@contextmanager
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


@pytest.mark.parametrize(("place", "obstacle"), [(own_folder, file_size_limit), (disk, filled_up)])
def test_a_full_disk_is_a_cache_less(
    tmp_path: Path,
    place: Callable[[Path], AbstractContextManager[Path]],
    obstacle: Callable[[Appliance, Path], AbstractContextManager[None]],
) -> None:
    prompts = [prompt(number, PROMPT_TOKENS) for number in range(4)]
    with place(tmp_path) as folder, appliance(tmp_path / "home", {"tiers.nvme.path": str(folder)}) as served:
        with obstacle(served, folder):
            cold = [served.complete(tokens) for tokens in prompts]
            until(lambda: degraded(served), "the disk is seen to be full")
            served.forget("hbm")
            for tokens, answer in zip(prompts, cold, strict=True):
                same(served, tokens, answer, dram=WARM_TOKENS)
            assert 'reason="full"' in served.get("/metrics").text
        served.forget("hbm", "dram")  # waits until all is durable
        for tokens, answer in zip(prompts, cold, strict=True):
            same(served, tokens, answer, nvme=WARM_TOKENS)
        assert not degraded(served)
        check_nothing_failed(served)
        assert kvctl(served.home, "verify").code == ExitCode.OK
        assert served.stop() == ExitCode.OK


def test_a_disk_smaller_than_the_capacity_gives_up_old_blocks_only(tmp_path: Path) -> None:
    with disk(tmp_path) as folder, appliance(tmp_path / "home", {"tiers.nvme.path": str(folder)}) as served:
        prompts = [prompt(number, PROMPT_TOKENS) for number in range(16)]
        cold = []
        for tokens in prompts:
            cold.append(served.complete(tokens))
            served.settle()
        assert served.metrics()["kvctl_evicted_blocks_total"] > 0
        restart(served)
        same(served, prompts[-1], cold[-1], nvme=WARM_TOKENS)
        for tokens, answer in zip(prompts, cold, strict=True):
            assert served.complete(tokens).text == answer.text
        check_nothing_failed(served)
