"""Quality of BinaryMoS and of the methods its paper compares with, on one model and one budget.

    python benchmarks/quality.py --model MODEL --work DIR --text wiki.test.raw --limit 8
    python benchmarks/quality.py ... --compare experts                      # E = 1, 2, 4, 8
    python benchmarks/quality.py ... --compare calibration --stage hessian  # each text, and all
    python benchmarks/quality.py --predict-cost LLaMA-1/2-7B            # from the rows so far

Every method is made in DIR by a command of its own, on the same calibration windows; a stage that
starts from another one's result takes the model of that row. It is then scored by perplexity.py
and, with --zero-shot, by zero_shot.py. A row is written when it is complete and never made again;
an interrupted method continues (omniquant starts again). Stages kd-scales, qat and experts see
--tokens in addition: their rows say so. Baselines are dense models with quantized values. A model
that was made elsewhere, on the same calibration windows, is scored where it is: --made qat-e1=DIR.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from harness import (
    DTYPES,
    REPOSITORY,
    common_parser,
    logger,
    machine_facts,
    positive_int,
    start,
    write_json,
)
from perplexity import BACKENDS
from plots import plot_quality
from quality_cost import cost_table, shapes_of
from quality_methods import (
    CALIBRATION,
    COMPARISONS,
    PAPER,
    Method,
    MethodError,
    bits_per_weight,
    make,
    methods,
    text_names,
    trained_tokens,
)

FIT = ("windows", "length", "seed", "calibration", "tokens", "steps", "batch")
SCORE = ("context", "limit", "backend", "dtype", "zero_shot_limit")


def open_results(args: argparse.Namespace) -> dict[str, Any]:
    """The results so far, or empty ones.

    Raises:
        ValueError: if they were made with other settings.
    """
    settings = {name: getattr(args, name) for name in (*FIT, *SCORE)}
    settings["calibration"] = text_names(args.calibration)
    empty: dict[str, Any] = {"model": args.model.name, "settings": settings, "rows": []}
    if not args.json.exists():
        return empty
    found: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8"))
    for what in ("model", "settings"):
        if found[what] != empty[what]:
            raise ValueError(
                f"--json {args.json} holds results of {what} {found[what]}, not {empty[what]}. "
                "Give another file."
            )
    return found


def complete(row: dict[str, Any], method: Method, model: Path, args: argparse.Namespace) -> bool:
    """Do what a row lacks, and note it there; returns whether anything was lacking."""
    texts = [text for text in args.text if text.name not in row["perplexity"]]
    if not texts and (args.zero_shot is None or row["zero_shot"]):
        return False
    fit = {name: getattr(args, name) for name in FIT}
    target = args.made.get(method.key, args.work / method.key)
    effort = make(method, model, target, fit, args.threads, args.made)
    row.setdefault("effort", effort)
    row["trained_tokens"] = trained_tokens(target)
    row |= bits_per_weight(target)
    for text in texts:
        row["perplexity"][text.name] = perplexity(target, args.work / method.key, text, args)
    if args.zero_shot is not None:
        row["zero_shot"] = zero_shot(target, args.work / method.key, args)
    return True


def perplexity(target: Path, output: Path, text: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What perplexity.py finds."""
    flags = ["--text", text, "--context", args.context, "--dtype", args.dtype]
    flags += ["--backend", args.backend]
    flags += ["--limit", args.limit] if args.limit else []
    found = _script("perplexity.py", target, output.with_name(f"{output.name}.json"), flags, args)
    row = found["rows"][0]
    return {what: row[what] for what in ("perplexity", "scored_tokens")} | {
        "protocol": found["protocol"]
    }


def zero_shot(target: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What zero_shot.py finds."""
    flags = ["--data", args.zero_shot, "--backend", args.backend, "--dtype", args.dtype]
    flags += ["--limit", args.zero_shot_limit] if args.zero_shot_limit else []
    output = output.with_name(f"{output.name}-zero-shot.json")
    found = _script("zero_shot.py", target, output, flags, args)
    return {what: found[what] for what in ("tasks", "average", "limit")}


def _script(
    name: str, target: Path, output: Path, flags: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    line = [sys.executable, REPOSITORY / "benchmarks" / name, target, "--json", output]
    line += [*flags, "--threads", args.threads]
    done = subprocess.run([str(part) for part in line], stdout=sys.stderr)
    if done.returncode != 0:
        raise MethodError(f"{name} failed on {target}; see above")
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result


def run(args: argparse.Namespace) -> None:
    """Complete the rows of the chosen methods, one after the other."""
    if args.stage and args.compare != CALIBRATION:
        raise ValueError(f"--stage {args.stage}: only --compare {CALIBRATION} takes a stage.")
    result = open_results(args)
    chosen = methods(args.compare, args.stage, args.calibration)
    known = [method.key for method in chosen]
    starts = {before.key for method in chosen for before in method.starts}
    for flag, keys, allowed in (
        ("--methods", args.methods or (), known),
        ("--made", args.made, [*known, *sorted(starts.difference(known))]),
    ):
        for key in keys:
            if key not in allowed:
                raise ValueError(f"{flag} {key}: known are {', '.join(allowed)}.")
    args.work.mkdir(parents=True, exist_ok=True)
    result["machine"] = machine_facts(args.threads)
    layers = Counter(shapes_of(str(args.model)))
    result["shapes"] = [[N, K, count] for (N, K), count in layers.items()]
    for method in chosen:
        if args.methods and method.key not in args.methods:
            continue
        row = next((row for row in result["rows"] if row["key"] == method.key), None)
        if row is None:
            row = {"key": method.key, "name": method.name, "stage": method.stage, "E": method.E}
            row |= {"texts": [Path(t).name for t in method.texts], "perplexity": {}}
            row |= {"zero_shot": {}}
        if not complete(row, method, args.model, args):
            logger.info("%s: done before", method.key)
            continue
        if row not in result["rows"]:
            result["rows"].append(row)
        write_json(args.json, result)
        print(f"{method.name}: {row['bits']:.2f} bits, {_summary(row)}", flush=True)
    plot_quality(result, args.json.with_suffix(".png"))


def _summary(row: dict[str, Any]) -> str:
    parts = [f"{name} {found['perplexity']:.2f}" for name, found in row["perplexity"].items()]
    if row["zero_shot"]:
        parts.append(f"zero-shot average {100 * row['zero_shot']['average']:.1f} %")
    return ", ".join(parts)


def _made(text: str) -> tuple[str, Path]:
    key, equals, path = text.partition("=")
    if not equals or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"expected KEY=DIR with an existing directory, not {text}")
    return key, Path(path)


def main() -> int:
    """Run the command line; returns 1 if a method fails, 2 for wrong use."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "quality.json")
    parser.add_argument("--model", type=Path, help="dense model: a directory or a .gguf file")
    parser.add_argument("--work", type=Path, help="directory for the methods' models")
    parser.add_argument("--compare", choices=COMPARISONS, default=PAPER, help="what is compared")
    parser.add_argument("--methods", nargs="+", metavar="KEY", help="only these of them")
    parser.add_argument(
        "--made", type=_made, action="append", default=[], metavar="KEY=DIR", help="see above"
    )
    parser.add_argument("--stage", help="of the ablation over calibration texts (default: qat)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="as of perplexity.py")
    parser.add_argument("--context", type=positive_int, default=2048, help="tokens in a window")
    parser.add_argument("--limit", type=positive_int, help="score only the first windows")
    parser.add_argument("--backend", choices=BACKENDS, default="vllm", help="for all scores")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="likewise")
    parser.add_argument("--zero-shot", type=Path, metavar="DIR", help="as --data of zero_shot.py")
    parser.add_argument("--zero-shot-limit", type=positive_int, help="questions of each task")
    parser.add_argument("--calibration", action="append", default=[], help="as of hf_to_bmos.py")
    parser.add_argument("--windows", type=positive_int, default=32, help="of calibration text")
    parser.add_argument("--length", type=positive_int, default=1024, help="tokens in a window")
    parser.add_argument("--tokens", type=positive_int, default=250_000, help="as of hf_to_bmos.py")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument("--steps", type=positive_int, default=200, help="of omniquant, per block")
    parser.add_argument("--batch", type=positive_int, default=8, help="windows in such a step")
    parser.add_argument(
        "--predict-cost", metavar="SHAPE", help="print times for a model of this shape, or MODEL"
    )
    args = parser.parse_args()
    args.made = dict(args.made)
    start(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        if args.predict_cost:
            print(cost_table(json.loads(args.json.read_text(encoding="utf-8")), args.predict_cost))
            return 0
        if args.model is None or args.work is None or not args.text:
            raise ValueError("--model, --work and --text are needed.")
        run(args)
    except ValueError as error:
        logger.error("error: %s", error)
        return 2
    except MethodError as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
