"""What one tenant's prompts left behind is invisible to every other, and a key works from the moment it is printed."""

from __future__ import annotations

import pytest

from tests.support.appliance import BLOCK, Appliance, kvctl, prompt


def test_a_tenant_added_while_it_runs_starts_cold_with_the_same_prompt(served: Appliance) -> None:
    tokens = prompt(1, BLOCK * 3 + 5)
    mine = served.complete(tokens)
    added = kvctl(served.home, "tenant", "add", "bob", "--json").json
    assert added["tenant"] == "bob"
    with served.client(added["api_key"]) as bob:
        for lose in ((), ("hbm",), ("hbm", "dram")):
            served.forget(*lose)
            salted = "".join(lose).rjust(32, "0")
            theirs = served.complete(tokens, http=bob, cache_salt=salted)
            assert (theirs.cached_tokens, theirs.text) == (0, mine.text)
        served.stop()
        served.start()
    with served.client(added["api_key"]) as bob:
        assert bob.get("/metrics").status_code == 403, "they tell of all tenants"
        assert served.complete(tokens, http=bob).cached_tokens == 0
        assert served.complete(tokens, http=bob).cached_tokens == len(tokens) - 1, "his own"
    assert served.complete(tokens).cached_tokens == len(tokens) - 1, "and the first tenant's is still there"
    listed = kvctl(served.home, "tenant", "list", "--json").json
    assert [tenant["tenant"] for tenant in listed["tenants"]] == ["default", "bob"]


@pytest.mark.parametrize("lose", [(), ("hbm",), ("hbm", "dram")], ids=["hbm", "dram", "nvme"])
def test_a_salt_splits_the_cache_in_every_tier(served: Appliance, lose: tuple[str, ...]) -> None:
    tokens = prompt(2 + len(lose), BLOCK * 2 + 5)
    plain = served.complete(tokens)
    salted = served.complete(tokens, cache_salt="a" * 32)
    assert (salted.cached_tokens, salted.text) == (0, plain.text)
    served.forget(*lose)  # type: ignore[arg-type]
    for salt, cached in ((None, len(tokens) - 1), ("a" * 32, len(tokens) - 1), ("b" * 32, 0)):
        assert served.complete(tokens, cache_salt=salt).cached_tokens == cached


@pytest.mark.parametrize("key", [None, "kvctl-" + "A" * 43, "x" * 10_000])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/tokenize", "/metrics"])
def test_without_a_known_key_nothing_is_told(served: Appliance, key: str | None, path: str) -> None:
    with served.client(key) as stranger:
        response = (
            stranger.get(path) if path in ("/v1/models", "/metrics") else stranger.post(path, json={"prompt": "x"})
        )
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.headers["www-authenticate"] == "Bearer"
        assert stranger.get("/health").status_code == 200, "which alone needs no key"


def test_admin_is_not_on_the_public_port(served: Appliance) -> None:
    assert served.get("/v1/admin/status").status_code == 404


def test_a_quota_bounds_a_tenant_while_it_runs_and_after_a_restart(served: Appliance) -> None:
    added = kvctl(served.home, "tenant", "add", "carl", "--json").json

    def stored() -> int:
        served.settle()
        return served.tier("nvme").blocks

    with served.client(added["api_key"]) as carl:
        before = stored()
        for seed in range(60, 64):
            served.complete(prompt(seed, BLOCK * 3), http=carl)
        held = stored() - before
        assert held >= 12
        record = 64 * 1024
        assert kvctl(served.home, "tenant", "quota", "carl", "--nvme", str(4 * record)).code == 0
        assert stored() - before < held
        assert served.metrics()["kvctl_evicted_blocks_total"] > 0
