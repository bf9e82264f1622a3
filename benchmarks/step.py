"""Where does the time of a decode step go? The kernels of the 1-bit layers beside vLLM's own parts.

    python benchmarks/step.py --shape llama-7b --batch 1 4 16 --json FILE

A vLLM engine in this process runs a model with random signs and scales (make_model.py), compiled as
`vllm serve` does it, on a CPU. So many requests, each with a prompt of --prompt tokens, decode at
the same time. Times of parts are those of the median step without a profiler; torch's profiler, in
steps of its own, then divides the model's forward pass by operators. A server's steps differ a
little: it has tcmalloc, and makes answers ready in another process. A markdown table is printed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import (
    common_parser,
    logger,
    machine_facts,
    positive_int,
    print_facts,
    start,
    write_json,
)
from make_model import SHAPES, add_model_flags, kept_bmos_model, with_layers
from vllm_bench import bound_to_cores

WARM_STEPS = 4
# Parts of the forward pass by what the names of their operators begin with. Without a mixture of
# experts none of these calls another of them, so that their times add up.
OPERATORS = {
    "1-bit layers": ("vllm_bmos::",),
    "attention and KV cache": ("vllm::unified_attention", "vllm::unified_kv_cache_update"),
}
REST = "norms, rotary embedding, activations, embedding"
ENGINE = "scheduler, inputs and outputs"


class Stopwatch:
    """Seconds that named parts took since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Time what happens inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self.seconds[part] = self.seconds.get(part, 0.0) + elapsed

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(part):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """What was measured; begins again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def main() -> int:
    """Run the command line."""
    args = parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **bound_to_cores(args.threads)}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    start(args.threads)
    machine = machine_facts(args.threads)
    print_facts(machine)
    shape = with_layers(SHAPES[args.shape], args.layers)
    model = kept_bmos_model(args.work, args.shape, shape, args.E)
    result: dict[str, Any] = {
        "machine": machine,
        "model": {"shape": args.shape, "layers": shape.num_hidden_layers, "E": args.E},
        "prompt": args.prompt,
        "steps": args.steps,
        "rows": measure(model, args),
    }
    write_json(args.json, result)
    print(table(result["rows"]))
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser((__doc__ or "").splitlines()[0], "step.json")
    add_model_flags(parser)
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=positive_int, default=32, help="tokens of a prompt")
    parser.add_argument("--steps", type=positive_int, default=16, help="measured for each batch")
    return parser.parse_args()


def measure(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch: milliseconds of a step and of its parts.

    Raises:
        RuntimeError: if vLLM runs on something else than a CPU, whose work would be waited for
            elsewhere than where it is begun.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError(f"expected vLLM for a CPU, found {current_platform.device_type}")
    longest = args.prompt + WARM_STEPS + 2 * args.steps + 2
    llm = LLM(
        str(model),
        max_model_len=longest,
        max_num_batched_tokens=max(longest, max(args.batch) * args.prompt),  # one prefill
        max_num_seqs=max(args.batch),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    watch = Stopwatch()
    llm.apply_model(lambda model: watch_model(model, watch))
    llm.collective_rpc(lambda worker: watch_sampler(worker, watch))
    rows = []
    for batch in args.batch:
        rows.append(measure_batch(llm.llm_engine, watch, batch, args))
        logger.info("%s", rows[-1])
    return rows


def watch_model(model: Any, watch: Stopwatch) -> None:
    """Time the forward pass and the head of a model that vLLM has loaded."""
    model.forward = watch.around("forward", model.forward)
    model.compute_logits = watch.around("lm_head", model.compute_logits)


def watch_sampler(worker: Any, watch: Stopwatch) -> None:
    """Time the sampler of a worker."""
    sampler = worker.model_runner.sampler
    sampler.forward = watch.around("sampler", sampler.forward)


def measure_batch(
    engine: Any, watch: Stopwatch, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a decode step of so many requests, and of its parts."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    length = WARM_STEPS + 2 * args.steps + 1
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    for request in range(batch):
        prompt = [300 + (7 * request + i) % 500 for i in range(args.prompt)]
        engine.add_request(f"{batch}-{request}", {"prompt_token_ids": prompt}, params)
    for _ in range(WARM_STEPS):  # the first is the prefill
        step_of_all(engine, batch)
    watch.take()
    steps: list[dict[str, float]] = []
    for _ in range(args.steps):
        with watch.of("step"):
            step_of_all(engine, batch)
        steps.append(watch.take())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(args.steps):
            step_of_all(engine, batch)
    profiled = watch.take()["forward"]
    while engine.has_unfinished_requests():
        engine.step()
    watch.take()
    median = sorted(steps, key=lambda step: step["step"])[args.steps // 2]  # its parts add up
    ms = {part: 1e3 * seconds for part, seconds in median.items()}
    share = operator_shares(profiler.key_averages(), profiled)
    parts = {part: ms["forward"] * share[part] for part in share}
    parts[REST] = ms["forward"] - sum(parts.values())
    parts |= {"lm_head": ms["lm_head"], "sampler": ms["sampler"]}
    parts[ENGINE] = ms["step"] - ms["forward"] - ms["lm_head"] - ms["sampler"]
    return {
        "batch": batch,
        "step_ms": round(ms["step"], 2),
        "tokens_per_s": round(1e3 * batch / ms["step"], 2),
        "parts_ms": {part: round(value, 2) for part, value in parts.items()},
    }


def step_of_all(engine: Any, batch: int) -> None:
    """One step, in which every request gets a token.

    Raises:
        RuntimeError: if some did not: the KV cache is too small for all, say.
    """
    while not (outputs := engine.step()):
        if not engine.has_unfinished_requests():
            raise RuntimeError("the requests ended before all steps were measured")
    if len(outputs) != batch:
        raise RuntimeError(
            f"expected tokens for {batch} requests in a step, found {len(outputs)}: "
            "VLLM_CPU_KVCACHE_SPACE (GB) may be too small for all of them at once"
        )


def operator_shares(averages: Any, forward_seconds: float) -> dict[str, float]:
    """Which part of the forward passes each of OPERATORS took, by torch's profiler.

    Args:
        averages: the profiler's `key_averages()`.
        forward_seconds: of all forward passes that it saw.

    Raises:
        ValueError: if an operator was not seen: vLLM may call it otherwise.
    """
    shares = {}
    for part, names in OPERATORS.items():
        found = [event.cpu_time_total for event in averages if event.key.startswith(names)]
        if not found:
            raise ValueError(
                f"{part}: expected operators {' or '.join(names)}*, found none of them. Add "
                "this vLLM's name to OPERATORS."
            )
        shares[part] = sum(found) / 1e6 / forward_seconds
    return shares


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and per cent of a step, a column a batch."""
    lines = [
        "| ms a step | " + " | ".join(f"batch {row['batch']}" for row in rows) + " |",
        "| --- |" + " ---: |" * len(rows),
    ]
    for part in rows[0]["parts_ms"]:
        cells = [
            f"{row['parts_ms'][part]:.1f} ({row['parts_ms'][part] / row['step_ms']:.0%})"
            for row in rows
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| all | " + " | ".join(f"{row['step_ms']:.1f}" for row in rows) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
