"""The peer to beat: llama-cpp-python's own LlamaDiskCache, after a restart, with the page cache dropped.

One process fills the cache; then, each time in a new process, the model is loaded, the cache's files are dropped from
the page cache, and the same prompt is asked again. Weights stay in the page cache, as they do for the appliance.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RESTARTS = 3


@dataclass(frozen=True)
class DiskCacheTimes:
    cold_s: float
    warm_s: float
    """Median TTFT after a restart."""
    runs: list[float]
    stored_bytes: int


def measure(model: Path, folder: Path, prompt_tokens: int, threads: int, batch_threads: int) -> DiskCacheTimes:
    with tempfile.TemporaryDirectory(dir=folder) as cache:

        def ask() -> dict[str, float]:
            arguments = [str(model), cache, str(prompt_tokens), str(threads), str(batch_threads)]
            command = [sys.executable, "-m", "tests.bench.disk_cache", *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            answer: dict[str, float] = json.loads(done.stdout)
            return answer

        cold = ask()
        stored_bytes = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        warm = [ask() for _ in range(RESTARTS)]
        if not all(answer["text_sum"] == cold["text_sum"] for answer in warm):
            raise SystemExit("LlamaDiskCache answered something else after the restart")
        runs = [answer["ttft_s"] for answer in warm]
        return DiskCacheTimes(cold["ttft_s"], statistics.median(runs), runs, stored_bytes)


def _drop(folder: Path) -> None:
    """Write back what is dirty, then forget the pages."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _ask(model: str, cache: str, prompt_tokens: int, threads: int, batch_threads: int) -> None:
    import llama_cpp
    from llama_cpp import llama_cpp as ll

    from kvctl.bench.ttft import prompt

    defaults = ll.llama_model_default_params

    def parameters() -> object:
        found = defaults()
        found.use_extra_bufts = b"AMX_INT8 = 1" not in ll.llama_print_system_info()  # its kernels crash
        return found

    ll.llama_model_default_params = parameters
    llama = llama_cpp.Llama(
        model,
        n_ctx=prompt_tokens + 512,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=batch_threads,
        flash_attn=True,
        verbose=False,
    )
    tokens = prompt(lambda text: llama.tokenize(text.encode(), add_bos=False), prompt_tokens)
    _drop(Path(cache))
    llama.set_cache(llama_cpp.LlamaDiskCache(cache, capacity_bytes=2**34))
    started_s = time.perf_counter()
    ttft_s, texts = 0.0, []
    for chunk in llama.create_completion(tokens, max_tokens=8, temperature=0.0, stream=True):
        text = chunk["choices"][0]["text"]
        if text and not texts:
            ttft_s = time.perf_counter() - started_s
        texts.append(text)
    print(json.dumps({"ttft_s": ttft_s, "text_sum": sum("".join(texts).encode())}))  # noqa: T201


if __name__ == "__main__":
    _ask(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:]))
