"""status, inspect, prefetch, verify, tenant against an appliance of canned answers, and against none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.api import control
from kvctl.client import AdminClient
from kvctl.commands import explain
from kvctl.diagnostics import ExitCode
from tests.cli import canned
from tests.cli.conftest import Kvctl
from tests.support.fake_appliance import FakeAppliance

ERROR = {
    "error": {"message": "the tenant is not known", "type": "invalid_request_error", "param": "tenant", "code": None}
}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("Ein längerer Text", encoding="utf-8")
    return file


def test_status_shows_model_speed_tiers_and_what_to_know(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/status"] = (200, canned.STATUS.model_dump())
    result = kvctl("status")
    assert result.code == ExitCode.OK
    for part in (
        "ready for 3m 12s, pid 4242",
        "qwen2.5-0.5b-q8_0  qwen2 0.5B Q8_0 [/x]",
        "restarted 1x",
        "16,384 tokens, 12 KiB each",
        "decode 2, 1 beside others; prefill 2",
        "21.4 ms per token, 412 tok/s prefill",
        "81% cached: hbm 8,000, dram 2,000",
        "dram 1 MiB, nvme 64 MiB at 512 MiB/s",
        "2 records did not verify",
        "note: the pool could not be locked",
        "note: nvme: EIO",
    ):
        assert part in result.out
    assert [line.split()[:2] for line in result.out.splitlines() if line.startswith(("hbm", "dram", "nvme"))] == [
        ["hbm", "ok"],
        ["dram", "ok"],
        ["nvme", "degraded"],
    ]


def test_status_as_json_is_the_model_itself(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/status"] = (200, canned.STATUS.model_dump())
    result = kvctl("status", "--json")
    assert control.Status.model_validate(result.json) == canned.STATUS
    assert result.err == ""


def test_status_while_loading(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/status"] = (200, canned.LOADING.model_dump())
    result = kvctl("status")
    assert result.code == ExitCode.OK
    assert result.out.startswith("state    loading x (43%) for 1.5 s, pid 4242, version 0.1.0")
    assert control.Loading.model_validate(kvctl("status", "--json").json) == canned.LOADING
    asked = kvctl("chat", "Hello")
    assert (asked.code, asked.complaint) == (ExitCode.API, "the appliance is loading x (43%)")


def test_inspect_shows_the_store(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/store"] = (200, canned.STORE.model_dump())
    lines = kvctl("inspect").out.splitlines()
    assert lines[-1].split() == ["nvme", "ok", "310", "79,360", "1", "GiB", "16", "GiB", "2.5", "s", "25h", "0m"]
    assert control.StoreOverview.model_validate(kvctl("inspect", "--json").json) == canned.STORE


def test_explain_says_in_words_what_a_request_did(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/requests/chatcmpl-6f"] = (200, canned.EXPLAINED.model_dump())
    result = kvctl("explain", "chatcmpl-6f")
    assert result.code == ExitCode.OK
    for part in (
        "to load all that was stored was cheapest",
        "8,192 from nvme of 8,410 tokens came in 110 ms (est. 100 ms), 96 MiB.",
        "218 tokens were computed in 900 ms (est. 1.0 s).",
        "Recomputing would have cost 44.0 s.",
        "First token after 1.5 s, of it 200 ms in the queue.",
    ):
        assert part in result.out
    assert control.RequestList.model_validate(kvctl("explain", "chatcmpl-6f", "--json").json) == canned.EXPLAINED


def test_explain_lists_the_last_requests(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/requests"] = (200, canned.EXPLAINED.model_dump())
    row = kvctl("explain").out.splitlines()[-1].split()
    assert row == ["chatcmpl-6f-0", "load", "8,410", "8,192", "1.5", "s"]


def test_explain_keeps_an_id_in_one_piece(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    name = f"chatcmpl-{'0' * 24}-10"
    (record,) = canned.EXPLAINED.requests
    listed = control.RequestList(requests=[record.model_copy(update={"request": name})])
    appliance.replies["GET /v1/admin/requests"] = (200, listed.model_dump())
    header, row = kvctl("explain").out.splitlines()
    assert row.split() == [name, "load", "8,410", "8,192", "1.5", "s"]
    assert header.split()[-1] == "TTFT"


def test_explain_lists_estimates_too_where_there_is_room(
    kvctl: Kvctl, appliance: FakeAppliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "WIDE", 80)
    appliance.replies["GET /v1/admin/requests"] = (200, canned.EXPLAINED.model_dump())
    header, row = kvctl("explain").out.splitlines()
    assert header.split()[-2:] == ["took", "estimated"]
    assert row.split()[-4:] == ["1.3", "s", "1.5", "s"]


def test_an_empty_id_is_not_all_of_them(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["GET /v1/admin/requests/"] = (404, {"error": {"message": "this id is not among them"}})
    assert kvctl("explain", "").complaint == "this id is not among them"


def test_a_request_nobody_knows_is_one_line(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    error = {"error": {"message": "this id is not among the last 2,000 requests that ended"}}
    appliance.replies["GET /v1/admin/requests/x%2Fy"] = (404, error)
    result = kvctl("explain", "x/y")
    assert (result.code, result.complaint) == (
        ExitCode.USAGE,
        "this id is not among the last 2,000 requests that ended",
    )


def test_inspect_shows_where_the_tokens_of_a_prompt_are(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    appliance.replies["POST /v1/admin/inspect"] = (200, canned.INSPECTION.model_dump())
    result = kvctl("inspect", "--prompt-file", str(prompt), "--tenant", "legal")
    asked = control.PromptRef.model_validate(appliance.body_of("POST /v1/admin/inspect"))
    assert (asked.tenant, asked.prompt, asked.messages) == ("legal", "Ein längerer Text", None)
    lines = result.out.splitlines()
    assert lines[0] == "1,000 tokens, 900 cached (90%)"
    assert (lines[1].count("█"), lines[1].count("░")) == (70, 8)
    assert [line.split() for line in lines[4:7]] == [
        ["hbm", "0", "512", "512"],
        ["nvme", "512", "900", "388"],
        ["to", "compute", "900", "1,000", "100"],
    ]
    assert lines[-1] == "estimated TTFT 250 ms, cold 2.5 s  10x"


def test_messages_are_a_list_or_an_object_with_one(kvctl: Kvctl, appliance: FakeAppliance, tmp_path: Path) -> None:
    appliance.replies["POST /v1/admin/inspect"] = (200, canned.INSPECTION.model_dump())
    messages = [{"role": "user", "content": "Hi"}]
    for tree in (messages, {"messages": messages, "model": "x"}):
        file = tmp_path / "messages.json"
        file.write_text(json.dumps(tree))
        appliance.requests.clear()
        assert kvctl("inspect", "--messages", str(file), "--json").code == ExitCode.OK
        asked = appliance.body_of("POST /v1/admin/inspect")
        assert asked is not None
        assert asked["messages"] == messages


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("--prompt-file", b"\xff\xfe\x00", "not UTF-8 text (byte 0); save it as UTF-8 first"),
        ("--prompt-file", None, "No such file or directory"),
        ("--messages", b'[{"role": "user"', "not JSON: "),
        ("--messages", b"[]", "write a list of messages"),
        ("--messages", b'{"prompt": "x"}', "write a list of messages"),
        ("--messages", b'["Hi"]', "write a list of messages"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prefetch"])
def test_a_file_that_is_no_prompt(
    kvctl: Kvctl,
    appliance: FakeAppliance,
    tmp_path: Path,
    command: str,
    name: str,
    content: bytes | None,
    complaint: str,
) -> None:
    file = tmp_path / "p"
    if content is not None:
        file.write_bytes(content)
    result = kvctl(command, name, str(file))
    assert result.code == ExitCode.USAGE
    assert result.complaint.startswith(f"{file}: {complaint}")
    assert appliance.requests == []


def test_a_prompt_is_named_one_way(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    result = kvctl("inspect", "--prompt-file", str(prompt), "--messages", str(prompt))
    assert result.code == ExitCode.USAGE
    assert "either --prompt-file FILE (plain text) or --messages FILE (JSON)" in result.complaint


def test_prefetch_reports_what_was_where_and_what_moved(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    first = canned.prefetched(moved_tokens=256, moved_bytes=256 * 12288, seconds=0.02, done=False)
    appliance.replies["POST /v1/admin/prefetch"] = (200, [first, canned.prefetched()])
    result = kvctl("prefetch", "--prompt-file", str(prompt), "--to", "hbm", "--compute")
    asked = control.PrefetchRequest.model_validate(appliance.body_of("POST /v1/admin/prefetch"))
    assert (asked.to, asked.compute) == ("hbm", True)
    assert result.code == ExitCode.OK
    assert "dram 200, nvme 700, no tier 100" in result.out
    assert "700 tokens, 8.2 MiB, 164 MiB/s" in result.out
    assert kvctl("prefetch", "--prompt-file", str(prompt), "--json").json == canned.prefetched()


def test_a_prefetch_that_fails_says_why(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    error = {"error": {"message": "no free cells", "type": "server_error"}}
    appliance.replies["POST /v1/admin/prefetch"] = (200, [canned.prefetched(done=False), error])
    result = kvctl("prefetch", "--prompt-file", str(prompt))
    assert result.code == ExitCode.API
    assert "no free cells" in result.complaint


def test_a_prefetch_that_is_cut_off_says_so(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    appliance.replies["POST /v1/admin/prefetch"] = (200, [canned.prefetched(done=False)])
    result = kvctl("prefetch", "--prompt-file", str(prompt))
    assert result.code == ExitCode.API
    assert "did not finish" in result.complaint


@pytest.mark.parametrize(
    ("typed", "report", "code", "verdict"),
    [
        ([], canned.report(), ExitCode.OK, "clean"),
        ([], canned.report(ok=9, bad={"tag": 1}), ExitCode.DAMAGE, "damaged"),
        ([], canned.report(index_missing=1), ExitCode.DAMAGE, "damaged"),
        ([], canned.report(index_dangling=1), ExitCode.DAMAGE, "damaged"),
        (["--repair"], canned.report(ok=9, bad={"tag": 1}, repaired=1), ExitCode.OK, "repaired"),
    ],
)
def test_verify_says_by_its_exit_code_what_it_found(
    kvctl: Kvctl, appliance: FakeAppliance, typed: list[str], report: control.VerifyReport, code: ExitCode, verdict: str
) -> None:
    appliance.replies["POST /v1/admin/verify"] = (200, canned.verified(report))
    result = kvctl("verify", *typed)
    assert result.code == code
    assert appliance.body_of("POST /v1/admin/verify") == {"repair": bool(typed)}
    assert result.out.splitlines()[-1].startswith(verdict)
    as_json = kvctl("verify", *typed, "--json")
    assert as_json.code == code
    assert control.VerifyReport.model_validate(as_json.json) == report


def test_a_verify_that_is_cut_off_is_no_good_news(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["POST /v1/admin/verify"] = (200, canned.verified(canned.report())[:1])
    result = kvctl("verify")
    assert result.code == ExitCode.API
    assert "without a report" in result.complaint


def test_tenants_of_a_running_appliance(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies["POST /v1/admin/tenants"] = (200, {"tenant": "legal", "api_key": "kvctl-abc"})
    assert kvctl("tenant", "add", "legal", "--json").json == {"tenant": "legal", "api_key": "kvctl-abc"}
    assert appliance.body_of("POST /v1/admin/tenants") == {"name": "legal"}
    spoken = kvctl("tenant", "add", "legal")
    assert spoken.out == "kvctl-abc\n"
    assert "shown this once" in spoken.err
    quotas = {"dram_quota_bytes": 2**30, "nvme_quota_bytes": None}
    tenants = [{"tenant": "legal", "api_keys": 2, "created": "2026-01-02T03:04:05Z", **quotas}]
    appliance.replies["GET /v1/admin/tenants"] = (200, {"tenants": tenants})
    assert kvctl("tenant", "list", "--json").json == {"tenants": tenants}
    assert kvctl("tenant", "list").out.splitlines()[1].split() == [
        "legal",
        "2",
        "2026-01-02T03:04:05Z",
        "1",
        "GiB",
        "-",
    ]


def test_tenants_of_a_stopped_appliance(kvctl: Kvctl) -> None:
    assert kvctl("init").code == ExitCode.OK
    added = kvctl("tenant", "add", "legal", "--json").json
    assert added["tenant"] == "legal"
    assert added["api_key"].startswith("kvctl-")
    assert [t["tenant"] for t in kvctl("tenant", "list", "--json").json["tenants"]] == ["default", "legal"]


@pytest.mark.parametrize("name", ["Legal", "-x", "a b", "", "x" * 64, "ä", "../x"])
def test_a_tenant_name_that_cannot_be(kvctl: Kvctl, appliance: FakeAppliance, name: str) -> None:
    result = kvctl("tenant", "add", "--", name)
    assert result.code == ExitCode.USAGE
    assert "cannot name a tenant: use lower-case letters" in result.complaint
    assert appliance.requests == []


@pytest.mark.parametrize(
    ("status", "body", "code", "complaint"),
    [
        (404, ERROR, ExitCode.USAGE, "the tenant is not known"),
        (503, ERROR, ExitCode.API, "the tenant is not known"),
        (500, ERROR, ExitCode.API, "the tenant is not known"),
        (502, "<html>", ExitCode.API, "HTTP 502 from appliance: not the answer of an appliance"),
        (200, "<html>", ExitCode.API, "not JSON"),
        (200, {"state": "ready"}, ExitCode.API, "does not understand the answer"),
    ],
)
def test_answers_that_are_none(
    kvctl: Kvctl, appliance: FakeAppliance, status: int, body: dict[str, object] | str, code: ExitCode, complaint: str
) -> None:
    appliance.replies["GET /v1/admin/status"] = (status, body)
    result = kvctl("status")
    assert result.code == code
    assert complaint in result.complaint


@pytest.mark.parametrize("command", ["status", "inspect"])
def test_nothing_runs(kvctl: Kvctl, stopped: Path, command: str) -> None:
    result = kvctl(command)
    assert result.code == ExitCode.NOT_RUNNING
    assert result.complaint == f"no appliance is running on {stopped}; start one with: kvctl serve"


def test_a_socket_left_by_a_crash_is_nobody(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    import socket

    path = appliance.home / "left" / "admin.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    (path.parent / "client.toml").write_text("")
    assert kvctl("status", "--home", str(path.parent)).code == ExitCode.NOT_RUNNING


def test_init_says_what_it_made_and_then_that_all_was_there(kvctl: Kvctl, home: Path) -> None:
    first = kvctl("init", "--json").json
    assert set(first) == {"home", "tenant", "key_file", "client_file", "created"}
    assert first["home"] == str(home)
    assert "keyring" in first["created"]
    second = kvctl("init")
    assert second.code == ExitCode.OK
    assert "nothing: all was there" in second.out
    assert "kvctl serve" in second.err


def test_verify_of_a_stopped_appliance(kvctl: Kvctl, home: Path) -> None:
    assert kvctl("verify").code == ExitCode.NOT_INITIALISED
    assert kvctl("init").code == ExitCode.OK
    result = kvctl("verify", "--json")
    assert result.code == ExitCode.OK
    report = control.VerifyReport.model_validate(result.json)
    assert (report.clean, report.records) == (True, 0)
    assert kvctl("verify").out.splitlines()[-1].strip() == "clean"


def test_the_client_evicts_a_tier(appliance: FakeAppliance) -> None:
    appliance.replies["POST /v1/admin/evict"] = (200, {"freed": 7})
    with AdminClient(appliance.home) as admin:
        assert admin.evict("dram").freed == 7
    assert appliance.body_of("POST /v1/admin/evict") == {"tier": "dram"}


def test_sessions_are_listed_with_when_they_are_due(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    fields: dict[str, Any] = {"tenant": "t", "turns": 3, "tokens": 4200, "idle_s": 12.0, "think_s": 30.0}
    found = {
        "sessions": [
            {"name": "chat-[1]", "chance": 0.34, "running": 0, **fields},
            {"name": None, "chance": 0.0, "running": 1, **fields},
        ]
    }
    appliance.replies["GET /v1/admin/sessions"] = (200, found)
    lines = kvctl("inspect", "--sessions").out.splitlines()
    assert lines[1].split() == ["chat-[1]", "t", "3", "4,200", "12.0", "s", "30.0", "s", "34%"]
    assert lines[2].split()[0::8] == ["unnamed", "running"]
    assert kvctl("inspect", "--sessions", "--json").json == found
    assert kvctl("inspect", "--sessions", "--prompt-file", "x").code == ExitCode.USAGE


def test_evict_forgets_a_prompt_or_empties_a_tier(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    appliance.replies["POST /v1/admin/erase"] = (200, {"freed": 4})
    appliance.replies["POST /v1/admin/evict"] = (200, {"freed": 1234})
    assert kvctl("evict", "--prompt-file", str(prompt), "--tenant", "bob").out == "4 blocks forgotten\n"
    asked = control.PromptRef.model_validate(appliance.body_of("POST /v1/admin/erase"))
    assert (asked.tenant, asked.prompt) == ("bob", "Ein längerer Text")
    assert kvctl("evict", "--tier", "hbm").out == "1,234 cells forgotten\n"
    assert kvctl("evict", "--tier", "dram", "--json").json == {"freed": 1234}
    for wrong in ((), ("--tier", "dram", "--prompt-file", str(prompt))):
        assert kvctl("evict", *wrong).code == ExitCode.USAGE


def test_pins_say_what_they_take(kvctl: Kvctl, appliance: FakeAppliance, prompt: Path) -> None:
    done = {"prompt_tokens": 3115, "tokens": 3114, "blocks": 13, "pinned_bytes": 2**20, "budget_bytes": 2**30}
    for path in ("pin", "unpin"):
        appliance.replies[f"POST /v1/admin/{path}"] = (200, done)
    asked = ("--prompt-file", str(prompt), "--tenant", "bob")
    assert kvctl("pin", *asked).out == "3,114 of 3,115 tokens pinned; all pins take 1 MiB of 1 GiB\n"
    assert control.PromptRef.model_validate(appliance.body_of("POST /v1/admin/pin")).tenant == "bob"
    assert kvctl("unpin", *asked).out.startswith("13 blocks unpinned")
    assert kvctl("pin", *asked, "--json").json == done
    assert kvctl("pin").code == ExitCode.USAGE


def test_a_quota_is_set_while_it_runs_and_while_it_does_not(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    info = {"tenant": "legal", "api_keys": 1, "created": "now", "dram_quota_bytes": 2**30, "nvme_quota_bytes": None}
    appliance.replies["POST /v1/admin/quota"] = (200, info)
    assert kvctl("tenant", "quota", "legal", "--dram", "1GiB").out == "legal: dram 1 GiB, nvme -\n"
    assert appliance.body_of("POST /v1/admin/quota") == {"tenant": "legal", "dram_bytes": 2**30, "nvme_bytes": None}
    assert kvctl("tenant", "quota", "legal", "--dram", "much").code == ExitCode.USAGE


def test_a_quota_of_a_stopped_appliance_is_in_its_keyring(kvctl: Kvctl) -> None:
    assert kvctl("init").code == ExitCode.OK
    assert kvctl("tenant", "quota", "default", "--nvme", "64MiB", "--json").json["nvme_quota_bytes"] == 64 * 2**20
    assert "64 MiB" in kvctl("tenant", "list").out
    assert kvctl("tenant", "quota", "nobody", "--nvme", "1GiB").code != ExitCode.OK
