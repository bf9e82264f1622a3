"""One `vllm serve`, measured from outside: load time, memory, and rates by `vllm bench serve`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import logger, resident_bytes

from examples.server import Server, session_pids

DECODE_PROMPT = 32
PREFILL_REPEATS = 3
START_SECONDS = 900
LOG_TIME = r"(\d\d-\d\d \d\d:\d\d:\d\d) "


@dataclass(frozen=True)
class Load:
    """What is asked of the server.

    Attributes:
        batches: numbers of requests that decode at the same time.
        prompt: tokens of the prompt whose prefill is timed.
        output: tokens that each decoding request writes.
        threads: OpenMP threads of the worker.
        kv_gib: size of the KV cache.
        options: further options of `vllm serve`.
    """

    batches: list[int]
    prompt: int
    output: int
    threads: int
    kv_gib: int = 2
    options: list[str] = field(default_factory=list)


def measure_server(
    model: Path,
    load: Load,
    options: Iterable[str],
    work: Path,
    rates: bool = True,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Serve a model, measure it, stop it.

    Args:
        model: what is served.
        load: what is asked of it.
        options: of `vllm serve`, besides the load's.
        work: directory for logs.
        rates: whether to send requests.
        env: additions to the server's environment.

    Returns:
        ready_seconds (start of the process until it answers), weights_seconds (reading and
        re-laying the weights, from the log's whole seconds), resident_bytes when it is ready,
        and, with `rates`, decode_tokens_per_s by batch, prefill_tokens_per_s, ttft_ms, and
        loaded_bytes: what is resident after all those requests.
    """
    server = Server(
        model,
        [
            *("--max-model-len", str(load.prompt + load.output)),
            *("--max-num-seqs", str(max(load.batches, default=1))),
            "--no-enable-prefix-caching",  # a run warms up with the prompt that it measures first
            *load.options,
            *options,
        ],
        log=work / "server.log",
        env={
            "VLLM_CPU_KVCACHE_SPACE": str(load.kv_gib),
            **bound_to_cores(load.threads),
            **(env or {}),
        },
        timeout=START_SECONDS,
    )
    begin = time.perf_counter()
    with server:
        result: dict[str, Any] = {"ready_seconds": round(time.perf_counter() - begin, 1)}
        result["weights_seconds"] = weights_seconds(server.log_text())
        assert server.process is not None
        result["resident_bytes"] = resident_bytes(session_pids(server.process.pid))
        if rates:
            result |= _rates(model, server.url, load, work)
            result["loaded_bytes"] = resident_bytes(session_pids(server.process.pid))
    return result


def weights_seconds(log: str) -> float | None:
    """Seconds between the log lines before and after reading and re-laying the weights."""
    before = re.search(LOG_TIME + r".*Initializing model took", log)
    after = re.search(LOG_TIME + r".*Warming up model", log)
    if before is None or after is None:
        return None
    first, last = (datetime.strptime(m[1], "%m-%d %H:%M:%S") for m in (before, after))
    return (last - first).total_seconds()


def _rates(model: Path, url: str, load: Load, work: Path) -> dict[str, Any]:
    prefill = _bench(model, url, load.prompt, 1, PREFILL_REPEATS, 1, work)
    ttft = prefill["median_ttft_ms"]
    decode = {}
    for B in load.batches:
        found = _bench(model, url, DECODE_PROMPT, load.output, B, B, work)
        decode[str(B)] = round(1e3 * B / found["median_tpot_ms"], 2)
        logger.info("batch %d: %s tokens/s", B, decode[str(B)])
    return {
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": round(1e3 * load.prompt / ttft, 1),
        "ttft_ms": round(ttft, 1),
    }


def _bench(
    model: Path, url: str, prompt: int, output: int, requests: int, concurrency: int, work: Path
) -> dict[str, Any]:
    """One run of `vllm bench serve` on random prompts."""
    file = work / "bench.json"
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
    command += ["--model", str(model), "--base-url", url, "--dataset-name", "random"]
    command += ["--random-input-len", str(prompt), "--random-output-len", str(output)]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency)]
    command += ["--num-warmups", "1", "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--seed", str(time.time_ns() % 2**31)]
    command += ["--save-result", "--result-dir", str(work), "--result-filename", file.name]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(file.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"only {found['completed']} of {requests} requests succeeded")
    return found


def bound_to_cores(threads: int) -> dict[str, str]:
    """The environment in which vLLM has a thread on each of the first `threads` usable cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
