"""A one-bit model as the speculative draft of a dense one: is it lossless, and what does it gain?

    python benchmarks/draft.py --shape llama-1b --acceptance 0.8 --json FILE
    python benchmarks/draft.py --target DENSE --draft PACKED --json FILE

The first makes a pair of a shape whose draft is right about so many of the target's tokens, by
construction: vLLM cannot simulate an acceptance rate on a CPU. All the layers of both compute, but
add nothing, so that the next token depends on the last one only; the target walks through all of
its vocabulary, and the draft has wrong embeddings for the rest of the tokens. The second takes a
real pair, say a model and its own fit, and SmolLM2's chat prompts.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import (
    common_parser,
    logger,
    machine_facts,
    positive_int,
    print_facts,
    start,
    write_json,
)
from make_model import SHAPES, Shape, make_bmos_model, with_layers, write_config, write_tokenizer
from safetensors.torch import save_file

from vllm_bmos.checkpoint import Checkpoint
from vllm_bmos.checkpoint.format import OUT_SCALE
from vllm_bmos.checkpoint.writer import CheckpointWriter

SHARD_BYTES = 2 * 10**9
RESIDUAL = ("o_proj", "down_proj")
QUESTIONS = [
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Write a short poem about the sea.",
    "List three prime numbers and say why they are prime.",
]


def main() -> int:
    """Run the command line; the exit status is 1 if the draft changed an answer."""
    args = parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # for both of a 7B pair
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    start(args.threads)
    machine = machine_facts(args.threads)
    print_facts(machine)
    with tempfile.TemporaryDirectory(prefix="draft-", dir=args.work) as work:
        target, draft = args.target, args.draft
        result: dict[str, Any] = {"machine": machine, "tokens": args.tokens, "dtype": args.dtype}
        if target is None:
            shape = with_layers(SHAPES[args.shape], args.layers)
            target, draft = make_pair(Path(work), shape, args.E, args.acceptance)
            pair = {"shape": args.shape, "layers": shape.num_hidden_layers, "E": args.E}
            result |= {"pair": pair, "simulated_acceptance": args.acceptance}
        prompts = make_prompts(target, real=args.target is not None)
        answers, alone = run(target, None, 0, prompts, args)
        result["alone"] = alone
        result["drafted"] = []
        for count in args.draft_tokens:
            found, row = run(target, draft, count, prompts, args)
            equal = sum(one == other for one, other in zip(found, answers, strict=True))
            row |= {"equal_answers": f"{equal} of {len(answers)}"}
            row["speedup"] = round(row["tokens_per_s"] / alone["tokens_per_s"], 2)
            result["drafted"].append(row)
            logger.info("%s", row)
            write_json(args.json, result)
    return int(any(row["equal_answers"] != alone["answers"] for row in result["drafted"]))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = common_parser(__doc__.splitlines()[0], "draft.json")
    parser.add_argument("--target", type=Path, help="a dense model's directory")
    parser.add_argument("--draft", type=Path, help="the packed checkpoint that drafts for it")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b", help="of a made pair")
    parser.add_argument("--layers", type=positive_int, help="fewer decoder blocks")
    parser.add_argument("--E", type=positive_int, default=4)
    parser.add_argument("--acceptance", type=float, default=0.8, help="of a made pair")
    parser.add_argument("--draft-tokens", nargs="+", type=positive_int, default=[2, 3, 4])
    parser.add_argument("--tokens", type=positive_int, default=128, help="length of an answer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--work", type=Path, help="where a made pair is kept meanwhile")
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    return args


def make_pair(work: Path, shape: Shape, E: int, acceptance: float) -> tuple[Path, Path]:
    """A dense target and a packed draft that agree after so many of the vocabulary's tokens."""
    generator = torch.Generator().manual_seed(0)
    V, d = shape.vocab_size, shape.hidden_size
    embedding = torch.randn(V, d, generator=generator).to(torch.bfloat16)
    cycle = torch.randperm(V, generator=generator)
    head = torch.empty_like(embedding)
    head[cycle.roll(-1)] = embedding[cycle]  # after cycle[i] comes cycle[i + 1]
    wrong = torch.rand(V, generator=generator) >= acceptance
    guess = torch.where(wrong[:, None], embedding.roll(1, 0), embedding)

    target = work / "target"
    target.mkdir()
    write_config(target, shape, None)
    write_tokenizer(target, V)
    ones = torch.ones(d, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": ones,
    }
    for layer in range(shape.num_hidden_layers):
        block = f"model.layers.{layer}"
        for name, (N, K) in shape.linears.items():
            weight = torch.zeros(N, K, dtype=torch.bfloat16)
            if not name.endswith(RESIDUAL):
                weight.normal_(std=K**-0.5, generator=generator)
            tensors[f"{block}.{name}.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = ones.clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    del tensors

    made, draft = work / "made", work / "draft"
    make_bmos_model(made, shape, E)
    source = Checkpoint(made)
    draft.mkdir()
    for file in made.glob("*.json"):
        (draft / file.name).write_bytes(file.read_bytes())
    writer = CheckpointWriter(draft, source.specs, SHARD_BYTES)
    dense = {"model.embed_tokens.weight": guess, "lm_head.weight": head}
    for name in source.specs:
        tensor = dense[name] if name in dense else source.tensor(name)
        silent = name.endswith(tuple(f"{layer}.{OUT_SCALE}" for layer in RESIDUAL))
        writer.write(name, torch.zeros_like(tensor) if silent else tensor)
    writer.finish()
    return target, draft


def make_prompts(target: Path, real: bool) -> list[list[int]]:
    """Prompts as tokens: a chat model's questions, or random tokens."""
    if not real:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(300, 1000, (16,), generator=generator).tolist() for _ in range(4)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def run(
    target: Path, draft: Path | None, count: int, prompts: list[list[int]], args: argparse.Namespace
) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy answers one after the other, and how fast they came."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {}
    if draft is not None:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": count,
        }
    llm = LLM(
        str(target),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        **options,
    )
    params = SamplingParams(
        temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False
    )

    warm = params.clone()
    warm.max_tokens = 8
    generate(llm, warm, prompts[:1])
    before = counters(llm)
    times, answers = [], []
    for prompt in prompts:
        begin = time.perf_counter()
        answers += generate(llm, params, [prompt])
        times.append(time.perf_counter() - begin)
    after = counters(llm)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    rates = sorted(args.tokens / seconds for seconds in times)
    row: dict[str, Any] = {
        "draft_tokens": count,
        "tokens_per_s": round(statistics.median(rates), 2),
        "tokens_per_s_all": [round(rate, 2) for rate in rates],
        "answers": f"{len(answers)} of {len(answers)}",
    }
    if draft is not None:
        drafted, accepted, steps = (after[name] - before[name] for name in COUNTERS)
        row["acceptance_rate"] = round(accepted / drafted, 3)
        row["tokens_per_step"] = round(1 + accepted / steps, 2)
    return answers, row


COUNTERS = (
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:spec_decode_num_drafts",
)


def generate(llm: Any, params: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that a vLLM engine answers."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(inputs, params, use_tqdm=False)]


def counters(llm: Any) -> dict[str, float]:
    """VLLM's counts of drafted tokens, accepted tokens and drafts."""
    found = dict.fromkeys(COUNTERS, 0.0)
    for metric in llm.get_metrics():
        if metric.name in found:
            found[metric.name] += metric.value
    return found


if __name__ == "__main__":
    sys.exit(main())
