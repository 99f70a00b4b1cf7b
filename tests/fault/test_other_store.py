"""What another model, build or format version wrote is never read as our own: the answer is a cold one, and all goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from struct import Struct

import google_crc32c
import pytest

from appliance.kv import index
from appliance.ops.synth import synth
from appliance.security.keyring import Keyring
from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, Appliance, appliance, kvctl, prompt
from tests.support.bare import bare_engine
from tests.support.models import tiny_model
from tests.support.records import PAGE, SUPERBLOCK, Record, overwrite, records

TOKENS = prompt(1, BLOCK * 5 + 9)
WARM_TOKENS = len(TOKENS) - 1


def asked(served: Appliance) -> tuple[str, int]:
    """The completion, and how many tokens of the prompt were found."""
    answer = served.complete(TOKENS)
    return answer.text, answer.cached_tokens


def test_another_model_or_another_layout_of_its_cache(tmp_path: Path) -> None:
    """All in one store, one after the other: each is cold, and the first is still there in the end."""
    other = synth("tiny", tmp_path / "other" / "tiny.gguf", seed=1)
    longer = tmp_path / "longer" / "tiny.gguf"
    longer.parent.mkdir()
    longer.write_bytes(tiny_model().read_bytes() + bytes(32))
    with appliance(tmp_path / "apart", model=other) as served:
        of_other = asked(served)
    home = tmp_path / "home"
    with appliance(home) as served:
        mine = asked(served)
    assert mine[0] != of_other[0], "misreading one for the other would show"
    with appliance(home, model=other) as served:
        assert asked(served) == of_other
    with appliance(home, model=longer) as served:
        assert asked(served) == (mine[0], 0), "equal weights in another file are not known to be equal"
    for settings in ({"engine.kv_type_k": "f32", "engine.kv_type_v": "f32"}, {"kv.block_tokens": 32}):
        with appliance(home, settings) as served:
            assert asked(served)[1] == 0
            served.forget("hbm", "dram")
            assert asked(served)[1] == WARM_TOKENS
    with appliance(home) as served:
        assert asked(served) == (mine[0], WARM_TOKENS)
        assert kvctl(home, "verify").code == ExitCode.OK


async def test_another_engine_build_with_the_same_layout(tmp_path: Path) -> None:
    """The hardest to tell apart: only the fingerprint differs."""
    async with bare_engine() as engine:
        mine = engine.engine.info.fingerprint
        others = [replace(mine, layout=bytes(32)), replace(mine, model=bytes(32))]
        async with engine.serving(tmp_path) as served:
            cold = await served.ask(TOKENS)
        for fingerprint in others:
            async with engine.serving(tmp_path, fingerprint) as served:
                assert (await served.ask(TOKENS)).cached == 0
        for fingerprint in (mine, *others):
            async with engine.serving(tmp_path, fingerprint) as served:
                again = await served.ask(TOKENS)
                assert (again.tokens, again.cached) == (cold.tokens, WARM_TOKENS)


# --- format versions: everything as this build wrote it, but for the version and the checksum over it ----------------------


def superblock_of_version_2(record: Record) -> None:
    head = bytearray(record.segment.read_bytes()[:PAGE])
    head[SUPERBLOCK["version"]] = 2
    at = SUPERBLOCK["checksum"]
    head[at : at + 4] = google_crc32c.value(bytes(head[:at])).to_bytes(4, "little")
    overwrite(record.segment, 0, bytes(head))


def record_of_version_2(record: Record) -> None:
    head = bytearray(record.data[:128])
    head[4] = 2
    head[124:128] = google_crc32c.value(bytes(head[:124])).to_bytes(4, "little")
    overwrite(record.segment, record.offset, bytes(head))


@pytest.mark.parametrize(
    ("rewrite", "metric"),
    [
        (superblock_of_version_2, "kvctl_quarantined_segments_total"),
        (record_of_version_2, "kvctl_integrity_failures_total"),
    ],
)
def test_segments_and_records_of_another_format_version(
    tmp_path: Path, rewrite: Callable[[Record], None], metric: str
) -> None:
    with appliance(tmp_path) as served:
        mine = asked(served)
        served.stop()
        first = records(tmp_path)[0]
        rewrite(first)
        served.start()
        assert asked(served) == (mine[0], 0)
        assert served.metrics()[metric] == 1
        served.forget("hbm", "dram")
        assert asked(served) == (mine[0], WARM_TOKENS), "stored anew"
        assert kvctl(tmp_path, "verify").code == ExitCode.OK


def test_an_index_of_another_format_version_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with appliance(tmp_path) as served:
        mine = asked(served)
        served.stop()
        path = tmp_path / "store" / "index" / index.FILE_NAME
        path.unlink()
        monkeypatch.setattr(index, "FORMAT_VERSION", index.FORMAT_VERSION + 1)
        keyring = Keyring.open(tmp_path, tmp_path / "unlock.key")
        index.Index(
            path, index_key=keyring.index_key, store_uuid=keyring.store_uuid, map_bytes=2**20, create=True
        ).close()
        served.start()
        assert asked(served) == (mine[0], WARM_TOKENS)
        assert served.metrics()["kvctl_index_rebuilds_total"] == 1


def test_a_keyring_of_another_format_version_is_refused_and_kept(tmp_path: Path) -> None:
    with appliance(tmp_path) as served:
        mine = asked(served)
    copies = {name: (tmp_path / name).read_bytes() for name in ("keyring.a", "keyring.b")}
    for name, data in copies.items():
        newer = data[:4] + Struct("<H").pack(2) + data[6:-4]
        (tmp_path / name).write_bytes(newer + google_crc32c.value(newer).to_bytes(4, "little"))
    refused = kvctl(tmp_path, "serve", "--model", str(tiny_model()), "--port", "0")
    assert refused.code == ExitCode.KEYRING
    assert "version" in refused.err
    for name, data in copies.items():
        assert (tmp_path / name).read_bytes() != data, "not replaced by an older build"
        (tmp_path / name).write_bytes(data)
    with appliance(tmp_path) as served:
        assert asked(served) == (mine[0], WARM_TOKENS)


def test_another_homes_segments_are_set_aside(tmp_path: Path) -> None:
    homes = tmp_path / "a", tmp_path / "b"
    answers = []
    for home in homes:
        with appliance(home) as served:
            answers.append(asked(served))
    for segment in (homes[0] / "store").glob("*.seg"):
        (homes[1] / "store" / segment.name).write_bytes(segment.read_bytes())
    with appliance(homes[1]) as served:
        assert asked(served) == (answers[1][0], 0)
        assert served.metrics()["kvctl_quarantined_segments_total"] == 1
        assert kvctl(homes[1], "verify").code == ExitCode.OK
