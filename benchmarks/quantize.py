"""Makes the dense twin of a model that one of the papers' baselines quantized.

    python benchmarks/quantize.py gptq MODEL OUT --windows 32 --length 1024

OUT is a Hugging Face directory with replaced weights (fake quantization) and `quantization.json`:
the method, its bits per weight and the calibration text. That text is the one that
`hf_to_bmos.py` fits on when its flags are the same. A killed run continues; one of omniquant starts
again.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from baselines import billm, gptq, omniquant, pb_llm
from baselines.sequential import BITS, PUBLISHED, Quantize, quantize_model, write_dense
from harness import add_threads, logger, positive_int, start, write_json

from converters.calibration import Calibration, CalibrationError, load_texts, sample
from converters.fitting.run import FitOptions, tokenizer_of
from converters.options import Options
from converters.plan import Plan, make_plan
from converters.workspace import TargetError
from vllm_bmos.checkpoint.format import FormatError

FLOAT16 = "float16"  # not quantized: the source as a Hugging Face directory
OMNIQUANT = "omniquant"
BY_LAYER: dict[str, Quantize] = {
    "gptq": gptq.quantize,
    "pb-llm": pb_llm.quantize,
    "billm": billm.quantize,
}
METHODS = (FLOAT16, *BY_LAYER, OMNIQUANT)
REPORT = "quantization.json"


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUT; returns what `quantization.json` says."""
    plan = make_plan(args.model, Options())
    source = plan.source
    if source.stage is None:
        raise FormatError(f"{args.model} is binary already; give the dense model.")
    report: dict[str, Any] = {"method": args.method, "model": args.model.resolve().name}
    if args.method == FLOAT16:
        write_dense(source, [], args.out)
        return {**report, BITS: 16.0, PUBLISHED: 16.0}
    text = calibration(plan, args)
    if args.method in BY_LAYER:
        facts = {**report, "plan": plan.fingerprint(), "calibration": text.record}
        method = BY_LAYER[args.method]
        bits = quantize_model(source, text.train, method, args.out, facts, args.threads)
    else:
        with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as dense:
            write_dense(source, [], Path(dense))
            bits = omniquant.quantize_model(
                source, Path(dense), text.train, args.out, args.steps, args.batch
            )
        report |= {"steps": args.steps, "batch": args.batch}
    return {**report, **bits, "calibration": text.record, "tokens": text.train.numel()}


def calibration(plan: Plan, args: argparse.Namespace) -> Calibration:
    """The windows that the converter's stages would fit on."""
    texts = load_texts(args.calibration)
    return sample(
        texts, tokenizer_of(plan), args.windows, FitOptions.held_out, args.length, args.seed
    )


def main() -> int:
    """Run the command line; returns 1 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path, help="dense model directory or .gguf file")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="TEXT", help="as of hf_to_bmos.py"
    )
    parser.add_argument("--windows", type=positive_int, default=32, help="of calibration text")
    parser.add_argument("--length", type=positive_int, default=1024, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows")
    parser.add_argument(
        "--steps", type=positive_int, default=omniquant.STEPS, help="of omniquant, for each block"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=omniquant.BATCH, help="windows in such a step"
    )
    add_threads(parser, "CPU threads")
    args = parser.parse_args()
    start(args.threads)
    try:
        report = quantize(args)
    except (FormatError, CalibrationError, TargetError) as error:
        logger.error("error: %s", error)
        return 1
    write_json(args.out / REPORT, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
