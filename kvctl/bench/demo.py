"""A document is read once, asked about twice, and still known after the appliance was killed."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from appliance.ops.init import init
from kvctl.child import Child, throwaway_home
from kvctl.client import AdminClient, Answer, PublicClient
from kvctl.output import Steps, duration

DOCUMENT_TOKENS = 4000
ANSWER_TOKENS = 32
FIRST, SECOND = "What was found last?", "Who was on shift?"


class Step(BaseModel):
    tier: str
    """cold | hbm | dram | nvme"""
    what: str
    ttft_s: float
    speedup: float
    """TTFT of the first question over this one."""
    prompt_tokens: int
    cached_tokens: int
    text: str


class DemoReport(BaseModel):
    model: str
    steps: list[Step]
    plot: str | None = None
    """The picture's file; None without matplotlib."""


def run(folder: Path, model: Path, say: Steps) -> DemoReport:
    """On a throw-away home in `folder`. KvctlError when the appliance cannot be started or answers an error."""
    steps: list[Step] = []

    def ask(tier: str, what: str, question: str) -> None:
        say(f"{what} ({tier})")
        with PublicClient(child.home) as client:
            content = f"{document}\n{question}"
            messages = [{"role": "user", "content": content}]
            answer = client.chat(messages, max_tokens=ANSWER_TOKENS, temperature=0.0)
        steps.append(_step(tier, what, answer, steps[0].ttft_s if steps else answer.ttft_s))
        cached = f"{answer.cached_tokens:,} of {answer.prompt_tokens:,} tokens were known"
        say.keep(f"{what}: first token after {duration(answer.ttft_s)}, {cached}")

    with throwaway_home(folder, "demo-") as home:
        init(home)
        arguments = ["--model", str(model), "--port", "0", "--set", "engine.context_tokens=8192"]
        with Child(home, arguments, lambda event: say(event["text"], event["fraction"])) as child:
            child.start()
            say.keep(f"serving {child.ready['model']}, pid {child.pid}")
            with PublicClient(home) as client:
                document = _document(client)
            ask("cold", "a document is read and asked about", FIRST)
            ask("hbm", "a second question", SECOND)
            child.settle()
            with AdminClient(home) as admin:
                admin.evict("hbm")
            ask("dram", "the same, the engine's cells emptied", SECOND)
            child.settle()
            killed = child.pid
            child.kill()
            say.keep(f"killed with SIGKILL, pid {killed}")
            child.start()
            say.keep(f"started again, pid {child.pid}")
            ask("nvme", "the same, after the crash", SECOND)
            return DemoReport(model=child.ready["model"], steps=steps)


def _step(tier: str, what: str, answer: Answer, cold_s: float) -> Step:
    return Step(
        tier=tier,
        what=what,
        ttft_s=answer.ttft_s,
        speedup=cold_s / answer.ttft_s,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        text=answer.text,
    )


def _document(client: PublicClient) -> str:
    """A log book of about DOCUMENT_TOKENS tokens, an entry a line."""
    lines: list[str] = []
    while True:
        for _ in range(8):
            n = len(lines) + 1
            lines.append(f"Day {n}: pump {n * 7 % 23} ran {n * 131 % 97} hours, valve {n * 11 % 41} was replaced.")
        document = "\n".join(lines)
        if len(client.tokenize(document)) >= DOCUMENT_TOKENS:
            return document
