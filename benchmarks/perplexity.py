"""Perplexity of a dense or packed model on a text, through transformers and through vLLM.

    python benchmarks/perplexity.py MODEL --text wiki.test.raw --context 1024 --limit 8

Protocol, printed with the number: the text is joined by a rule, tokenised whole, and cut into
windows that begin every `stride` tokens. A window is `context` tokens, behind a BOS token if asked.
Each token is scored once, by the first window that holds it, given all that stands before it in
that window; the very first token of a window without BOS is never scored. Perplexity is exp of the
mean negative log-likelihood of the scored tokens. stride = context is the protocol of GPTQ and
BinaryMoS; what is left of a last, shorter window is dropped, as there.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import DTYPES, common_parser, logger, machine_facts, positive_int, start, write_json

BACKENDS = ("transformers", "vllm")
AGREEMENT = 0.01  # largest relative difference of two backends' perplexities in the same dtype


@dataclass(frozen=True)
class Window:
    """Tokens of one forward pass; those from `first` on are scored."""

    tokens: list[int]
    first: int


@dataclass(frozen=True)
class Protocol:
    """All that a perplexity depends on beside the model."""

    text: str
    sha256: str
    join: str
    context: int
    stride: int
    bos: int | None
    limit: int | None

    def __str__(self) -> str:
        windows = "all windows" if self.limit is None else f"first {self.limit} windows"
        bos = "no BOS" if self.bos is None else f"BOS {self.bos}"
        return (
            f"{self.text} (sha256 {self.sha256[:8]}), joined by rule {self.join!r}, context "
            f"{self.context}, stride {self.stride}, {bos}, {windows}"
        )


def join_text(text: str, rule: str) -> str:
    r"""The text to tokenise.

    Args:
        text: the file's content.
        rule: "gptq" joins the lines as the rows of the Hugging Face data set are joined by GPTQ
            and BinaryMoS: "\n\n" between rows, a row being 'line\n', or '' for a blank line.
            "raw" takes the file as it is.
    """
    if rule == "raw":
        return text
    lines = text.removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def make_windows(
    tokens: list[int], context: int, stride: int, bos: int | None = None
) -> Iterator[Window]:
    """Cut tokens into windows that together score every token at most once.

    Raises:
        ValueError: unless 1 <= stride <= context and context >= 2.
    """
    if not 1 <= stride <= context or context < 2:
        raise ValueError(f"--stride {stride}, --context {context}: expected 1 <= stride <= context")
    done = 0
    for begin in range(0, len(tokens) - context + 1, stride):
        part = tokens[begin : begin + context]
        shift = 0 if bos is None else 1
        first = max(done - begin + shift, 1)
        yield Window(part if bos is None else [bos, *part], first)
        done = begin + context


@torch.inference_mode()
def score_transformers(model_path: Path, windows: list[Window], dtype: str) -> list[float]:
    """Negative log-likelihood of each window, in nats, by transformers and the reference op."""
    from transformers import AutoModelForCausalLM

    import vllm_bmos.integrations.transformers  # noqa: F401 (registers the quantizer)

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPES[dtype]).eval()
    losses = []
    for number, window in enumerate(windows, start=1):
        tokens = torch.tensor([window.tokens])
        logits = model(tokens).logits[0, window.first - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, window.first :], reduction="sum")
        losses.append(float(loss))
        _progress(number, windows, losses)
    return losses


def score_vllm(model_path: Path, windows: list[Window], dtype: str) -> list[float]:
    """Negative log-likelihood of each window, in nats, by vLLM's prompt_logprobs."""
    # One process, so that nothing outlives the last window.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a CPU has no memory to fill up
    from vllm import LLM, SamplingParams

    longest = max(len(window.tokens) for window in windows)
    llm = LLM(
        str(model_path),
        dtype=dtype,
        max_model_len=longest + 1,  # vLLM generates at least one token
        enable_prefix_caching=False,  # a cached prompt has no logits
        enforce_eager=True,
        max_num_seqs=4,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    losses = []
    for number, window in enumerate(windows, start=1):
        output = llm.generate({"prompt_token_ids": window.tokens}, sampling, use_tqdm=False)[0]
        steps = zip(
            output.prompt_logprobs[window.first :], window.tokens[window.first :], strict=True
        )
        losses.append(-sum(step[token].logprob for step, token in steps))
        _progress(number, windows, losses)
    return losses


def perplexity(losses: list[float], windows: list[Window]) -> float:
    """The exponential of the mean negative log-likelihood per scored token."""
    count = sum(len(w.tokens) - w.first for w in windows[: len(losses)])
    return math.exp(min(sum(losses) / count, 700.0))


def _progress(number: int, windows: list[Window], losses: list[float]) -> None:
    if number in (1, 2, 4) or number % 8 == 0 or number == len(windows):
        so_far = perplexity(losses, windows)
        logger.info("window %d of %d: perplexity so far %.3f", number, len(windows), so_far)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score one model by every chosen backend."""
    from transformers import AutoTokenizer

    raw = args.text.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bos = tokenizer.bos_token_id if args.bos else None
    if args.bos and bos is None:
        raise ValueError(f"--bos: the tokenizer of {args.model} has no BOS token.")
    protocol = Protocol(
        text=args.text.name,
        sha256=hashlib.sha256(raw).hexdigest(),
        join=args.join,
        context=args.context,
        stride=args.stride or args.context,
        bos=bos,
        limit=args.limit,
    )
    joined = join_text(raw.decode("utf-8"), protocol.join)
    tokens = tokenizer(joined, add_special_tokens=False, verbose=False).input_ids
    windows = list(make_windows(tokens, protocol.context, protocol.stride, bos))[: args.limit]
    if not windows:
        raise ValueError(f"--context {args.context}: the text has only {len(tokens)} tokens.")
    logger.info("%s\n%s: %d windows", args.model, protocol, len(windows))
    score: dict[str, Callable[[Path, list[Window], str], list[float]]] = {
        "transformers": score_transformers,
        "vllm": score_vllm,
    }
    rows = []
    for backend in args.backend:
        began = time.monotonic()
        losses = score[backend](args.model, windows, args.dtype)
        row = {
            "backend": backend,
            "dtype": args.dtype,
            "perplexity": perplexity(losses, windows),
            "scored_tokens": sum(len(w.tokens) - w.first for w in windows),
            "windows": len(windows),
            "seconds": round(time.monotonic() - began, 1),
            "window_nll": losses,
        }
        rows.append(row)
        print(f"{row['perplexity']:.3f}  {backend} {args.dtype}: {args.model.name} on {protocol}")
    return {
        "model": args.model.name,
        "protocol": asdict(protocol),
        "rows": rows,
        "machine": machine_facts(args.threads),
    }


def problem(rows: list[dict[str, Any]]) -> str | None:
    """What is wrong with the backends' perplexities, or None."""
    found = {row["backend"]: row["perplexity"] for row in rows}
    broken = [backend for backend, value in found.items() if math.isnan(value)]
    if broken:
        return f"the perplexity through {', '.join(broken)} is not a number"
    if max(found.values()) / min(found.values()) - 1 > AGREEMENT:
        return f"the backends disagree by more than {AGREEMENT:.0%}: {found}"
    return None


def main() -> int:
    """Run the command line; returns 1 if there is a `problem`, 2 for wrong use."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "perplexity.json")
    parser.add_argument("model", type=Path, help="model directory, packed or dense")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, as wiki.test.raw")
    parser.add_argument("--join", choices=("gptq", "raw"), default="gptq", help="rule for lines")
    parser.add_argument("--context", type=positive_int, default=2048, help="tokens in a window")
    parser.add_argument("--stride", type=positive_int, help="tokens between windows; as context")
    parser.add_argument("--bos", action="store_true", help="put BOS before each window")
    parser.add_argument("--limit", type=positive_int, help="score only the first windows")
    parser.add_argument("--backend", choices=BACKENDS, nargs="+", default=["transformers"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    args = parser.parse_args()
    start(args.threads)
    try:
        result = run(args)
    except ValueError as error:
        logger.error("error: %s", error)
        return 2
    write_json(args.json, result)
    found = problem(result["rows"])
    if found:
        logger.error("error: %s", found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
