from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli

from appliance import config
from appliance.config import PROFILE_DIR, Profile, Share, keys, load_profile, parse_share, parse_size, parse_time
from appliance.errors import ConfigError

MAX_KEYS = 45


def test_there_are_few_keys() -> None:
    assert len(keys()) <= MAX_KEYS


@pytest.mark.parametrize("path", sorted(PROFILE_DIR.glob("*.toml")), ids=lambda p: p.stem)
def test_built_in_profiles_load(path: Path) -> None:
    assert isinstance(load_profile(path.stem), Profile)


def test_default_profile_is_the_schema_with_a_comment_on_every_key() -> None:
    text = (PROFILE_DIR / "default.toml").read_text(encoding="utf-8")
    written: list[str] = []
    section, previous = "", ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            section = header[1]
        elif key := re.match(r"(\w+) = ", line):
            written.append(f"{section}.{key[1]}")
            assert previous.startswith("# "), f"{written[-1]} has no comment"
        previous = line
    assert written == keys()
    assert Profile.model_validate(tomli.loads(text)) == Profile()


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[server]\nport = 9000\nhost = "::1"\n')
    profile = load_profile(str(file), ["server.port=9001"])
    assert (profile.server.port, profile.server.host, profile.server.max_queue) == (
        9001,
        "::1",
        Profile().server.max_queue,
    )


@pytest.mark.parametrize(
    ("item", "section", "key", "value"),
    [
        ("tiers.dram.capacity=4GiB", "tiers.dram", "capacity", 4 * 2**30),
        ("tiers.dram.capacity=1024", "tiers.dram", "capacity", 1024),
        ("server.drain=500ms", "server", "drain", 0.5),
        ("kv.enabled=false", "kv", "enabled", False),
        ("model.path=a b=c.gguf", "model", "path", "a b=c.gguf"),
        ('model.path="quoted.gguf"', "model", "path", "quoted.gguf"),
    ],
)
def test_values_of_set(item: str, section: str, key: str, value: object) -> None:
    found: object = load_profile("default", [item])
    for name in [*section.split("."), key]:
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tiers.dram.capcity=4GiB"],
            '--set tiers.dram.capcity=4GiB: unknown key "tiers.dram.capcity"; did you mean "tiers.dram.capacity"?',
        ),
        (["contxt_tokens=4096"], 'did you mean "engine.context_tokens"?'),
        (["tiers.dram=4GiB"], '"tiers.dram" is a section; set one of its keys: tiers.dram.capacity, tiers.dram.lock'),
        (["port"], "write it as section.key=value"),
        (["server.port=http"], "server.port: "),
        (["server.port=65536"], "server.port: "),
        (["server.drain=30"], 'server.drain: "30" is not a time; write it like "30s"'),
        (["tiers.nvme.capacity=many"], 'tiers.nvme.capacity: "many" is not a size; write it like "64GiB"'),
        (["tiers.nvme.capacity=-1"], "tiers.nvme.capacity: "),
        (["tiers.nvme.capacity=true"], "tiers.nvme.capacity: "),
        (["engine.kv_type_k=f61"], "engine.kv_type_k: "),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("default", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[server]\nprot = 1\n", 'unknown key "server.prot"; did you mean "server.port"?'),
        (b"[sever]\nport = 1\n", 'unknown key "sever"; did you mean "server'),
        (b"server = 3\n", '"server" is a section: write [server]'),
        (b"[server\n", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b'[server]\nport = "x"\n', "server.port: "),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(file), ["server.port=1"])
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match='no profile or file "laptop"; did you mean "laptop-cpu"\\?; built-in: box-1gpu, '
    ):
        load_profile("laptop")


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_profile().server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("64GiB", 64 * 2**30), ("1.5 kib", 1536), ("10MB", 10**7), (7, 7), ("7", 7), ("0", 0)]
)
def test_sizes(text: object, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiB x", "1e3", "nan", True, None, [1]])
def test_not_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("500ms", 0.5), ("5m", 300), ("2h", 7200), ("1d", 86400), ("1.5 s", 1.5)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


def test_home_is_the_option_then_kvctl_home_then_xdg_then_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KVCTL_HOME", str(tmp_path / "env"))
    assert config.home(str(tmp_path / "flag")) == tmp_path / "flag"
    assert config.home() == tmp_path / "env"
    monkeypatch.delenv("KVCTL_HOME")
    assert config.home() == tmp_path / "xdg" / "kvctl"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert config.home() == tmp_path / ".local" / "state" / "kvctl"


def test_a_batch_that_cannot_hold_a_token_of_each_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_tokens = 32 is below max_sequences = 64"):
        load_profile("default", ["engine.batch_tokens=32"])


@pytest.mark.parametrize(
    ("text", "of_1000"),
    [("25%", 250), (" 12.5 % ", 125), ("0%", 0), ("100%", 1000), ("512", 512), (0, 0), ("4GiB", 1000)],
)
def test_a_share_is_a_percentage_or_a_size_and_never_more_than_the_whole(text: object, of_1000: int) -> None:
    assert parse_share(text).of(1000) == of_1000
    assert parse_share(parse_share(text)) == parse_share(text)


@pytest.mark.parametrize("text", ["101%", "-1%", "half", "", "25 percent", True])
def test_what_is_no_share_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match='write it like "25%" or "4GiB"'):
        parse_share(text)
    with pytest.raises(ConfigError, match=r"kv\.prefetch_budget"):
        load_profile("default", [f"kv.prefetch_budget={text}"])


def test_the_default_budget_is_a_quarter() -> None:
    assert Profile().kv.prefetch_budget == Share(fraction=0.25)
