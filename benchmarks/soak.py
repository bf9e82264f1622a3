"""Does a server of a BinaryMoS model stay correct and within its memory under hours of load?

    python benchmarks/soak.py --minutes 30 --json FILE

Serves a tiny random model with two LoRA adapters, asks everything once while it is idle, and then
lets clients ask the same at random: as many at once as the server has slots for half of the time,
three times as many for the other half. Every answer must be the idle server's. In the end
the server is asked everything once more, and gets SIGTERM in the middle of requests.
"""

import asyncio
import json
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from harness import (
    common_parser,
    logger,
    machine_facts,
    positive_int,
    print_facts,
    resident_bytes,
    start,
    write_json,
)
from make_model import SHAPES, make_bmos_model, make_dense_model
from safetensors.torch import save_file
from traffic import (
    ADAPTERS,
    ERRORS,
    MODEL,
    TIMEOUT_SECONDS,
    Job,
    Tally,
    answer,
    idle_answers,
    load,
    make_jobs,
)
from vllm_bench import bound_to_cores

from examples.server import Server, session_pids

SAMPLE_SECONDS = 5.0
WARM_UP = 0.25  # of the run, in which caches fill
MAX_DRIFT = 0.02
MAX_NEW = 5  # files that are opened once, late; a leak shows in thousands of requests
STOP_SECONDS = 60
RANK = 8
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


def main() -> int:
    """Run the command line; the exit status is 1 if the server failed."""
    parser = common_parser(__doc__.splitlines()[0], "soak.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="duration of the load")
    parser.add_argument("--slots", type=positive_int, default=8, help="--max-num-seqs")
    parser.add_argument("--tokens", type=positive_int, default=16, help="length of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dense",
        action="store_true",
        help="serve a dense model of the same shape: what fails there is vLLM's own",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=30,
        help="vLLM's: seconds that requests may take to end after SIGTERM; with 0 it aborts them, "
        "and in about half of the stops waits for clients that it will never answer",
    )
    args = parser.parse_args()
    start(args.threads)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = machine_facts(args.threads)
    print_facts(machine)
    result: dict[str, Any] = {
        "machine": machine,
        "minutes": args.minutes,
        "slots": args.slots,
        "dense": args.dense,
        "shutdown_timeout": args.shutdown_timeout,
    }
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        log = args.json.with_suffix(".log")
        model = Path(work) / "model"
        shape = SHAPES["tiny"]
        if args.dense:
            make_dense_model(model, shape, args.seed)
        else:
            make_bmos_model(model, shape, E=4, seed=args.seed)
        options = ["--shutdown-timeout", str(args.shutdown_timeout)]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", **bound_to_cores(args.threads)}
        seconds = args.minutes * 60
        result |= soak(model, options, env, log, seconds, args.slots, args.tokens, args.seed)
    result["failures"] = failures(result)
    write_json(args.json, result)
    for failure in result["failures"]:
        logger.error("FAILED: %s", failure)
    return 1 if result["failures"] else 0


def soak(
    model: Path,
    options: list[str],
    env: dict[str, str],
    log: Path,
    seconds: float,
    slots: int,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Serve a tiny model, load, check and stop; the result without the machine."""
    work = model.parent
    (model / "chat_template.jinja").write_text(TEMPLATE)
    adapters = [f"{name}={make_adapter(model, work / name)}" for name in ADAPTERS]
    temporary = work / "tmp"
    temporary.mkdir()
    options = [*options, "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "512", "--max-num-seqs", str(slots)]
    # On a CPU vLLM gives requests without an adapter the last slot's: it must stay free.
    options += ["--enable-lora", "--max-loras", str(len(ADAPTERS) + 1)]
    options += ["--max-lora-rank", str(RANK), "--lora-modules", *adapters]
    env = {**env, "TMPDIR": str(temporary)}
    jobs = make_jobs(tokens, seed)
    result: dict[str, Any] = {}
    with Server(model, options, log, env=env) as server:
        assert server.process is not None
        expected = asyncio.run(idle_answers(server.url, jobs))
        result["idle_before"] = open_things(server.process.pid, temporary)
        with Watch(server.process.pid) as watch:
            for name, clients in (("saturated", slots), ("overloaded", 3 * slots)):
                logger.info("%s: %d clients for %.0f s", name, clients, seconds / 2)
                tally = asyncio.run(load(server.url, jobs, expected, clients, seconds / 2, seed))
                result[name] = {"clients": clients, **summary(tally, seconds / 2)}
        result["memory"] = watch.summary()
        again = asyncio.run(idle_answers(server.url, jobs))
        result["idle_again_wrong"] = sum(a != b for a, b in zip(again, expected, strict=True))
        result["idle_after"] = open_things(server.process.pid, temporary)
        result["shutdown"] = stop_in_the_middle(server, tokens)
    return result


def make_adapter(model: Path, path: Path) -> Path:
    """A random LoRA adapter on every projection, in PEFT's layout."""
    path.mkdir()
    shape = SHAPES["tiny"]
    generator = torch.Generator().manual_seed(len(path.name) + ord(path.name[0]))
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for name, (N, K) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            A = torch.randn(RANK, K, generator=generator) * K**-0.5
            B = torch.randn(N, RANK, generator=generator) * RANK**-0.5
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = A, B
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted(name.rpartition(".")[2] for name in shape.linears)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def open_things(leader: int, temporary: Path) -> dict[str, int]:
    """Processes of the server's session, their open files, and files in its temporary folder."""
    pids = session_pids(leader)
    return {
        "processes": len(pids),
        "open_files": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        "temporary_files": sum(1 for path in temporary.rglob("*") if not path.is_dir()),
    }


@dataclass
class Watch:
    """Samples the resident memory of a session's processes from a thread of its own.

    Attributes:
        leader: the session's.
        samples: of each moment, bytes by the process's name.
    """

    leader: int
    samples: list[dict[str, int]] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            try:
                self.samples.append(resident_by_name(session_pids(self.leader)))
            except (FileNotFoundError, ProcessLookupError):
                continue  # a process ended while it was looked at

    def summary(self) -> dict[str, Any]:
        """What changed from the first to the last quarter of the samples after the warm-up."""
        warm = self.samples[int(len(self.samples) * WARM_UP) :]
        totals = growth([sum(sample.values()) for sample in warm])
        names = sorted({name for sample in warm for name in sample})
        parts = {name: growth([sample.get(name, 0) for sample in warm]) for name in names}
        drift = totals["last_quarter_bytes"] / totals["first_quarter_bytes"] - 1
        return {
            "samples": len(self.samples),
            **totals,
            "drift": round(drift, 4),
            "by_process": parts,
        }


def resident_by_name(pids: Sequence[int]) -> dict[str, int]:
    """Resident bytes of processes by the name that each has given itself."""
    found: dict[str, int] = {}
    for pid in pids:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        found[name] = found.get(name, 0) + resident_bytes([pid])
    return found


def growth(values: Sequence[float]) -> dict[str, float]:
    """Medians of the first and last quarters."""
    quarter = max(1, len(values) // 4)
    return {
        "first_quarter_bytes": statistics.median(values[:quarter]),
        "last_quarter_bytes": statistics.median(values[-quarter:]),
    }


def summary(tally: Tally, seconds: float) -> dict[str, Any]:
    """Counts and percentiles of one phase."""
    requests = sum(tally.counts.values())
    return {
        "requests": dict(tally.counts),
        "requests_per_s": round(requests / seconds, 2),
        "wrong": len(tally.wrong),
        "wrong_examples": tally.wrong[:5],
        "first_piece_ms": percentiles(tally.first),
        "latency_ms": {kind: percentiles(times) for kind, times in sorted(tally.seconds.items())},
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    ordered = sorted(seconds)
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
    return {name: round(1e3 * value, 1) for name, value in ranks.items()}


def stop_in_the_middle(server: Server, tokens: int) -> dict[str, Any]:
    """SIGTERM while requests run: how long it takes, and what it leaves."""
    process = server.process
    assert process is not None
    body = {"model": MODEL, "prompt": "go on", "max_tokens": 16 * tokens, "ignore_eos": True}
    job = Job("long", "completions", body)
    ends: list[str] = []

    async def ask() -> None:
        async def one(client: httpx.AsyncClient) -> None:
            try:
                text = await answer(client, job)
                ends.append(f"status {text}" if text in ERRORS else "answered" if text else "empty")
            except httpx.HTTPError as error:
                ends.append(type(error).__name__)

        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_SECONDS) as client:
            await asyncio.gather(*(one(client) for _ in range(8)))

    asking = threading.Thread(target=lambda: asyncio.run(ask()))
    asking.start()
    wait_until(lambda: running_requests(server.url) > 0)
    pids = session_pids(process.pid)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        code: int | None = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    seconds = round(time.monotonic() - begin, 1)
    asking.join(TIMEOUT_SECONDS)
    # The trackers of shared memory end when they see that their parents are gone.
    gone = wait_until(lambda: not set(pids) & set(session_pids(process.pid)))
    return {"seconds": seconds, "code": code, "requests": ends, "processes_left": not gone}


def running_requests(url: str) -> float:
    """How many requests the server works on now."""
    lines = httpx.get(f"{url}/metrics", timeout=TIMEOUT_SECONDS).text.splitlines()
    counts = [line for line in lines if line.startswith("vllm:num_requests_running")]
    return sum(float(line.split()[-1]) for line in counts)


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true within STOP_SECONDS."""
    end = time.monotonic() + STOP_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    found = []
    for phase in ("saturated", "overloaded"):
        if result[phase]["wrong"]:
            found.append(f"{phase}: {result[phase]['wrong']} wrong or failed answers")
    if result["idle_again_wrong"]:
        found.append(f"{result['idle_again_wrong']} wrong answers after the load")
    if result["memory"]["drift"] > MAX_DRIFT:
        found.append(f"resident memory grew by {result['memory']['drift']:.1%}")
    for name, before in result["idle_before"].items():
        after = result["idle_after"][name]
        if after > before + MAX_NEW:
            found.append(f"{name} of the idle server: {before} before the load, {after} after it")
    shutdown = result["shutdown"]
    if shutdown["code"] != 0:
        found.append(f"exit code {shutdown['code']} after SIGTERM (None: it ran on)")
    if shutdown["processes_left"]:
        found.append("processes were left behind")
    if len(shutdown["requests"]) != 8:
        found.append("a request was neither answered nor ended at the shutdown")
    return found


if __name__ == "__main__":
    sys.exit(main())
