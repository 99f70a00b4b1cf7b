"""What is said to the appliance, and its keys, are in its memory, in the answer, and nowhere else that anybody can read."""

from __future__ import annotations

import base64
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from appliance.api.control import PrefetchRequest, PromptRef
from appliance.security.keyring import Keyring
from kvctl.client import AdminClient, read_client_file
from tests.support.appliance import BLOCK, Appliance, appliance, kvctl, prompt, text, until
from tests.support.rigged import RIGGED, fault

SAID = "kestrel-7f3a9c-umbrella"
SALT = "marzipan-5e1b0d-gondola-" + "x" * 20
ANSWERED = "Q" * 24
FILLER = text(prompt(1, BLOCK * 3))


def forms(secret: bytes) -> dict[str, bytes]:
    """A secret as it is, and as it would look in text or among token ids. Base64 at whatever place in a longer text."""
    shifted = (base64.b64encode(bytes(shift) + secret)[-(-shift * 4 // 3) : -4] for shift in range(3))
    ids = list(secret)
    found = {
        "plain": secret,
        "hex": secret.hex().encode(),
        "escaped": repr(secret)[2:-1].encode(),
        "token ids": array("I", ids).tobytes(),
        "wide token ids": array("q", ids).tobytes(),
        "list": json.dumps(ids)[1:-1].encode(),
        "dense list": json.dumps(ids, separators=(",", ":"))[1:-1].encode(),
    }
    return found | {f"base64 at {shift}": coded[4:] for shift, coded in enumerate(shifted)}


def leaks(places: Mapping[str, bytes], secrets: Mapping[str, bytes]) -> list[str]:
    """What of the secrets is where."""
    needles = {(name, form): needle for name, secret in secrets.items() for form, needle in forms(secret).items()}
    return [
        f"{name} ({form}) in {place}"
        for place, data in places.items()
        for (name, form), needle in needles.items()
        if needle in data or (form == "hex" and needle.upper() in data)
    ]


def key_material(home: Path) -> dict[str, bytes]:
    keyring = Keyring.open(home, home / "unlock.key")
    keys = keyring.tenant("default")
    return {
        "hash key": keys.hash_key,
        "locate key": keys.locate_key,
        "data key": keys.data_key,
        "index key": keyring.index_key,
    }


def files(home: Path, *but: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name not in but
    }


def processes(served: Appliance) -> dict[str, bytes]:
    """What other programs can see of both."""
    status = served.status()
    assert status.engine.pid is not None
    return {
        f"{who} {what}": readable(Path(f"/proc/{pid}/{what}"))
        for who, pid in (("control", status.pid), ("engine", status.engine.pid))
        for what in ("cmdline", "environ")
    }


def readable(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError:
        return b""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Appliance, dict[str, bytes]]]:
    """An appliance that was told everything in every way, also while something failed; and what it said, but the answers."""
    folder = tmp_path_factory.mktemp("folder")
    heard: dict[str, bytes] = {}

    def hear(name: str, data: str) -> None:
        heard[name] = data.encode()

    with appliance(folder / "home", program=RIGGED) as served:
        whole = FILLER + SAID
        answer = served.complete(whole, logit_bias={str(ord("Q")): 100}, cache_salt=SALT)
        assert ANSWERED in answer.text
        served.complete(list(whole.encode()), stop=[SAID], user=SAID, prompt_cache_key=SAID, logprobs=3)
        served.chat([{"role": "system", "content": whole}, {"role": "user", "content": SAID}])
        for path, body in (
            ("/v1/completions", {"prompt": whole, "model": SAID}),
            ("/v1/completions", {"prompt": SAID * 500}),
            ("/v1/completions", {"prompt": whole, "temperature": SAID}),
            ("/v1/chat/completions", {"messages": [{"role": SAID, "content": SAID}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": SAID}]}]}),
            ("/tokenize", {"content": [SAID]}),
            (f"/{SAID}", {}),
        ):
            response = served.post(path, body)
            assert 400 <= response.status_code < 500
            hear(f"error {len(heard)}", response.text + str(response.headers))
        with served.client(f"kvctl-{SAID}") as stranger:
            hear("refusal", stranger.get("/v1/models").text)
        with AdminClient(served.home) as admin:
            hear("inspection", admin.inspect(PromptRef(prompt=whole)).model_dump_json())
            list(admin.prefetch(PrefetchRequest(prompt=SAID + FILLER, compute=True)))
        (folder / "prompt").write_text(whole)
        shown = kvctl(served.home, "--debug", "inspect", "--prompt-file", str(folder / "prompt"))
        hear("inspect", shown.out + shown.err)
        fault(served.home, write="io", read="io")
        served.complete(whole + "!")
        until(lambda: served.tier("nvme").state == "degraded", "the disk is seen to fail")
        restarts = served.status().engine.restarts
        with served.stream(whole, max_tokens=3000) as lines:
            next(lines)
            served.kill_engine()
            hear("last words", list(lines)[-1])
        served.engine_is_back(restarts + 1)
        fault(served.home)
        until(lambda: served.tier("nvme").state == "ok", "the disk works again")
        served.settle()
        hear("metrics", served.get("/metrics").text)
        hear("status", served.status().model_dump_json())
        with AdminClient(served.home) as admin:
            hear("store", admin.store().model_dump_json())
        heard |= processes(served)
        assert kvctl(served.home, "verify").code == 0
        served.stop()
        hear("log", served.child.said())
        hear("start", json.dumps(served.child.ready))
        yield served, heard


def test_prompts_and_completions_are_nowhere(told: tuple[Appliance, dict[str, bytes]]) -> None:
    served, heard = told
    secrets = {
        "prompt": SAID.encode(),
        "completion": ANSWERED.encode(),
        "filler": FILLER[:24].encode(),
        "salt": SALT.encode(),
    }
    assert leaks({**heard, **files(served.home)}, secrets) == []


def test_keys_are_only_in_their_files(told: tuple[Appliance, dict[str, bytes]]) -> None:
    served, heard = told
    secrets = key_material(served.home)
    api_key = read_client_file(served.home)[1].encode()
    unlock_key = (served.home / "unlock.key").read_bytes()
    assert leaks({**heard, **files(served.home)}, secrets) == []
    assert leaks({**heard, **files(served.home, "client.toml")}, {"API key": api_key}) == []
    assert leaks({**heard, **files(served.home, "unlock.key")}, {"unlock key": unlock_key}) == []
    assert leaks(files(served.home), {"API key": api_key}) == [
        "API key (plain) in client.toml",
        "API key (escaped) in client.toml",
    ]


def test_the_search_looked_where_it_says_and_finds_what_is_there(
    told: tuple[Appliance, dict[str, bytes]], tmp_path: Path
) -> None:
    served, heard = told
    searched = files(served.home)
    assert any(name.endswith(".seg") and len(data) > BLOCK * 512 for name, data in searched.items())
    assert {"store/index/index.lmdb", "keyring.a", "keyring.b", "calibration.json"} <= set(searched)
    assert b"DEBUG" in heard["log"]
    assert b"injected" in heard["log"], "what failed was logged"
    if os.geteuid() == 0:
        assert b"PATH=" in heard["control environ"]
        assert b"PATH=" in heard["engine environ"]
    assert b"appliance.engine.worker" in heard["engine cmdline"]
    assert b"engine_restarting" in heard["last words"]
    secret = SAID.encode()
    for form, planted in forms(secret).items():
        (tmp_path / "planted").write_bytes(b"\0" * 5 + planted + b"\xff")
        assert f"prompt ({form}) in planted" in leaks(files(tmp_path), {"prompt": secret}), form
    for before in range(4):
        (tmp_path / "planted").write_bytes(base64.b64encode(b"before!"[:before] + secret + b"after"))
        assert leaks(files(tmp_path), {"prompt": secret}), "inside a longer text"
