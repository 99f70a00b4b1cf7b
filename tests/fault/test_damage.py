"""Damage at rest, anywhere: less is found, it is counted and set aside, and every answer is the one a cold cache gives.

Each damaged place lies in a record, and segment, of a prompt of its own, so that one start shows what each of them does.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, Appliance, appliance, kvctl, prompt
from tests.support.bare import bare_engine
from tests.support.records import PAGE, SUPERBLOCK, Record, cut, flip, overwrite, records, zero_page

ONE_RECORD_A_SEGMENT = {"tiers.nvme.segment": "64KiB"}
PROMPT_TOKENS = 2 * BLOCK + 13
COMPLETION_TOKENS = 8

Blocks = tuple[Record, ...]
"""The records of one prompt: two blocks and a tail."""


@dataclass(frozen=True)
class Place:
    name: str
    block: int
    """Whose record it damages; those before it stay good."""
    damage: Callable[[Blocks, Blocks], None]
    """Given this prompt's records and those of another one."""
    lost_at_start: bool
    """It is gone before anybody asks for it; else it is found when it is opened."""


def place(name: str, damage: Callable[[Path, int], None], block: int, at: int) -> Place:
    where = f"{name} of block {block}"
    return Place(where, block, lambda mine, _: damage(mine[block].segment, mine[block].offset + at), damage is cut)


def in_superblock(name: str, damage: Callable[[Path, int], None], at: int) -> Place:
    return Place(f"superblock {name}", 1, lambda mine, _: damage(mine[1].segment, at), True)


def flips_at_field_boundaries(mine: Blocks) -> list[Place]:
    fields = [place(name, flip, block, at) for block in (0, 1) for name, at in mine[block].boundaries.items()]
    return fields + [in_superblock(name, flip, at) for name, at in SUPERBLOCK.items()]


def flips_anywhere(mine: Blocks) -> list[Place]:
    chance = random.Random(1)
    offsets = [(block, chance.randrange(mine[block].length)) for block in (0, 1, 2) * 14]
    return [place(f"byte {at}", flip, block, at) for block, at in offsets]


def zeroed_pages(mine: Blocks) -> list[Place]:
    pages = [(block, at) for block in (1, 2) for at in range(0, mine[block].length, PAGE)]
    used = [(block, at) for block, at in pages if any(mine[block].data[at : at + PAGE])]
    return [place(f"page at {at}", zero_page, block, at) for block, at in used] + [in_superblock("page", zero_page, 0)]


def cuts(mine: Blocks) -> list[Place]:
    n = mine[0].length
    inside = [0, 1, 128, PAGE - 1, PAGE, PAGE + 1, n // 2, n - PAGE, n - 1]
    ends = [place(f"end at {at}", cut, number % 2, at) for number, at in enumerate(inside)]
    return ends + [in_superblock(f"end at {at}", cut, at) for at in (0, 1, 96, PAGE - 1)]


def strangers(mine: Blocks) -> list[Place]:
    """Good records where they do not belong."""

    def into_second(name: str, data: Callable[[Blocks, Blocks], bytes], at: int = 0) -> Place:
        def damage(mine: Blocks, theirs: Blocks) -> None:
            overwrite(mine[1].segment, mine[1].offset + at, data(mine, theirs))

        return Place(name, 1, damage, False)

    def exchange(mine: Blocks, theirs: Blocks) -> None:
        shutil.copyfile(theirs[1].segment, mine[1].segment)

    return [
        into_second("another prompt's record", lambda mine, theirs: theirs[1].data),
        into_second("the record before it", lambda mine, theirs: mine[0].data),
        into_second("another prompt's head", lambda mine, theirs: theirs[1].data[:PAGE]),
        into_second("another prompt's body", lambda mine, theirs: theirs[1].data[PAGE:], PAGE),
        into_second("another prompt's tail", lambda mine, theirs: theirs[2].data),
        Place("another prompt's segment", 1, exchange, True),
    ]


KINDS = (flips_at_field_boundaries, flips_anywhere, zeroed_pages, cuts, strangers)


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    cold: str
    place: Place


@dataclass(frozen=True)
class Damaged:
    served: Appliance
    cases: dict[str, list[Case]]
    """By the name of their kind."""


def prompt_of(number: int) -> list[int]:
    """Below 256 numbers, none shares its first token with another."""
    return [number, *prompt(number, PROMPT_TOKENS - 1)]


def of_prompt(tokens: list[int], found: list[Record]) -> Blocks:
    mine = [r for r in found if r.tokens.ids()[:13] == tokens[r.start : r.start + BLOCK][:13]]
    blocks = tuple(sorted(mine, key=lambda record: record.start))
    assert [record.start for record in blocks] == [0, BLOCK, 2 * BLOCK]
    return blocks


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Damaged]:
    """Everything damaged at once, and the appliance started on it."""
    home = tmp_path_factory.mktemp("home")
    other = prompt_of(0)
    with appliance(home, ONE_RECORD_A_SEGMENT) as served:
        served.complete(other, max_tokens=COMPLETION_TOKENS)
        served.settle()
        example = of_prompt(other, records_of(served))
        kinds = {kind.__name__: kind(example) for kind in KINDS}
        number = iter(range(1, 256))
        cases: dict[str, list[Case]] = {}
        for kind, places in kinds.items():
            cases[kind] = []
            for each in places:
                tokens = prompt_of(next(number))
                cold = served.complete(tokens, max_tokens=COMPLETION_TOKENS).text
                cases[kind].append(Case(tokens, cold, each))
        served.stop()
        found = records(home)
        theirs = of_prompt(other, found)
        for case in (case for group in cases.values() for case in group):
            case.place.damage(of_prompt(case.prompt, found), theirs)
        served.start()
        yield Damaged(served, cases)


def records_of(served: Appliance) -> list[Record]:
    """Of a running appliance: it is stopped meanwhile."""
    served.stop()
    found = records(served.home)
    served.start()
    return found


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_what_is_damaged_is_a_miss_and_counted(damaged: Damaged, kind: str) -> None:
    served = damaged.served
    for case in damaged.cases[kind]:
        before = served.metrics()
        again = served.complete(case.prompt, max_tokens=COMPLETION_TOKENS)
        after = served.metrics()
        told = case.place.name
        assert again.text == case.cold, told
        assert again.cached_tokens == case.place.block * BLOCK, told
        for counter in ("kvctl_integrity_failures_total", "kvctl_quarantined_total"):
            counted = after.get(counter, 0) - before.get(counter, 0)
            assert counted == (not case.place.lost_at_start), f"{counter} {told}"


def test_there_were_enough_places(damaged: Damaged) -> None:
    assert sum(map(len, damaged.cases.values())) >= 150


def test_segments_that_are_not_ours_are_set_aside(damaged: Damaged) -> None:
    superblocks = [
        case.place.name
        for cases in damaged.cases.values()
        for case in cases
        if case.place.name.startswith("superblock") or case.place.name == "another prompt's segment"
    ]
    aside = list((damaged.served.home / "store" / "quarantine").glob("*.seg"))
    assert len(aside) == damaged.served.metrics()["kvctl_quarantined_segments_total"]
    assert len(aside) == len([name for name in superblocks if name != "superblock end at 0"]), (
        "an empty file is no damage"
    )
    assert any("set aside" in note for note in damaged.served.tier("nvme").notes)


def test_afterwards_the_store_is_whole_again(damaged: Damaged) -> None:
    served = damaged.served
    cases = [case for group in damaged.cases.values() for case in group]
    for case in cases:
        served.complete(case.prompt, max_tokens=COMPLETION_TOKENS)
    served.forget("hbm", "dram")
    assert kvctl(served.home, "verify").code == ExitCode.OK
    for case in cases[::5]:
        again = served.complete(case.prompt, max_tokens=COMPLETION_TOKENS)
        assert (again.text, again.cached_tokens) == (case.cold, PROMPT_TOKENS - 1), case.place.name


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_verify_finds_it_and_repair_drops_it(tmp_path: Path, running: bool) -> None:
    prompts = [prompt_of(number) for number in range(4)]
    with appliance(tmp_path, ONE_RECORD_A_SEGMENT) as served:
        cold = [served.complete(tokens, max_tokens=COMPLETION_TOKENS).text for tokens in prompts]
        served.stop()
        found = records(tmp_path)
        if running:
            served.start()
        for tokens, damage in zip(prompts, (flip, zero_page, flip), strict=False):
            record = of_prompt(tokens, found)[1]
            damage(record.segment, record.offset + 2 * PAGE)
        report = kvctl(tmp_path, "verify", "--json")
        assert report.code == ExitCode.DAMAGE
        assert (report.json["bad"], report.json["records"]) == ({"tag": 3}, 12)
        repaired = kvctl(tmp_path, "verify", "--repair", "--json")
        assert (repaired.code, repaired.json["repaired"]) == (ExitCode.OK, 3)
        clean = kvctl(tmp_path, "verify", "--json")
        assert (clean.code, clean.json["records"], clean.json["ok"]) == (ExitCode.OK, 9, 9)
        if not running:
            served.start()
        for tokens, expected, cached in zip(prompts, cold, (BLOCK, BLOCK, BLOCK, PROMPT_TOKENS - 1), strict=True):
            again = served.complete(tokens, max_tokens=COMPLETION_TOKENS)
            assert (again.text, again.cached_tokens) == (expected, cached)
        assert served.metrics().get("kvctl_integrity_failures_total", 0) == 0, "what was dropped is not met again"


@pytest.mark.parametrize("damage", [flip, zero_page, cut, None])
def test_a_damaged_index_is_rebuilt_and_nothing_is_lost(
    tmp_path: Path, damage: Callable[[Path, int], None] | None
) -> None:
    tokens = prompt_of(1)
    with appliance(tmp_path) as served:
        cold = served.complete(tokens)
        served.stop()
        index = tmp_path / "store" / "index" / "index.lmdb"
        if damage is None:
            index.unlink()
        else:
            damage(index, 16)  # the first meta page: what LMDB believes first
            damage(index, PAGE + 16)
        served.start()
        again = served.complete(tokens)
        assert (again.text, again.cached_tokens) == (cold.text, len(tokens) - 1)
        assert served.metrics()["kvctl_index_rebuilds_total"] == 1
        assert any("rebuilt" in note for note in served.tier("nvme").notes)
        assert kvctl(tmp_path, "verify").code == ExitCode.OK


async def test_damage_anywhere_in_the_index_file(tmp_path: Path) -> None:
    """As above, at many more places: the control process is this one, the engine is the real one."""
    prompts = [prompt_of(number) for number in range(20)]
    async with bare_engine() as engine:
        async with engine.serving(tmp_path) as served:
            cold = [await served.ask(tokens) for tokens in prompts]
        index = tmp_path / "store" / "index" / "index.lmdb"
        whole = index.read_bytes()
        chance = random.Random(2)
        rebuilds, places = 0.0, 0
        for page in range(0, len(whole), PAGE):
            for damage in (flip, zero_page) if page % (2 * PAGE) else (flip,):
                at = page + chance.randrange(PAGE)
                index.write_bytes(whole)
                damage(index, at)
                places += 1
                number = chance.randrange(len(prompts))
                async with engine.serving(tmp_path) as served:
                    again = await served.ask(prompts[number])
                    rebuilds += served.store.counters()["index_rebuilds_total"]
                assert (again.tokens, again.cached) == (cold[number].tokens, PROMPT_TOKENS - 1), (damage, at)
        assert places >= 50
        assert rebuilds >= 10, "the rest of the places is free, or in a page that nothing points to"
