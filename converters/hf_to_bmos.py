"""The command line of the converter: plan, run, report. Flags and exit codes: arguments.py."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: make the repository's packages importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from converters.arguments import BAD_INPUT, BAD_TARGET, INTERRUPTED, OK, parse
from converters.calibration import CalibrationError
from converters.compare import compare
from converters.evaluate import evaluate, router_entropy
from converters.fitting import FITTED_STAGES, STAGES, check_fittable, stages_up_to
from converters.fitting.distributed import is_main
from converters.layers_file import extract, plan_with_layers
from converters.locked import TargetError
from converters.model_card import model_card
from converters.options import Options
from converters.pipeline import convert
from converters.plan import Plan, make_plan
from converters.report import conversion_report, inspection, plan_report
from converters.side_files import README
from vllm_bmos.checkpoint.format import FormatError
from vllm_bmos.checkpoint.verify import verify
from vllm_bmos.checkpoint.writer import write_bytes

if TYPE_CHECKING:
    from converters.fitting.run import Fit

logger = logging.getLogger("hf_to_bmos")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    runs = {
        "convert": run_convert,
        "verify": run_verify,
        "inspect": run_inspect,
        "extract": run_extract,
    }
    args = parse(sys.argv[1:] if arguments is None else arguments, runs)
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
        what, why = error.filename or args.dst, error.strerror or error
        rest = "; what is done stays for --resume" if args.run is run_convert else ""
        logger.error("error: %s: %s%s", what, why, rest)
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
    text = read_text(args.eval_text) if args.eval_text else None
    if args.dry_run:
        if args.stage in FITTED_STAGES:
            check_fittable(plan, [args.stage] if args.start_from else stages_up_to(args.stage))
        if is_main():
            print(plan_report(plan, args.stage))
        return OK
    fit = make_fit(plan, args) if args.stage in FITTED_STAGES else None
    if fit:
        fit.run(args.dst, args.resume, args.jobs)
        if not is_main():
            return OK  # the first process of torchrun writes the result
        plan = fit.plan
    elif plan.source.stage in STAGES:
        _warn_data_free(plan)
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
    text = read_text(args.text) if args.text else None
    entropy = router_entropy(args.dst, text) if text else {}
    print(inspection(args.dst, as_json=args.json, entropy=entropy))
    return OK


def run_extract(args: argparse.Namespace) -> int:
    """`extract DST FILE`: the packed layers alone."""
    size = extract(args.dst, args.file)
    print(f"{args.file}: {size / 1e6:.1f} MB; convert the dense model with --layers {args.file}")
    return OK


def read_text(file: Path) -> str:
    """A text to measure on.

    Raises:
        CalibrationError: if it is not there, not UTF-8 or empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: {error}. Give a UTF-8 text file.") from None
    if len(text.strip()) < 2:
        raise CalibrationError(f"{file}: expected text, found {len(text)} characters.")
    return text


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
    from converters.fitting.run import Fit, FitOptions
    from converters.fitting.training import DistillOptions

    def chosen(**given: Any) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}

    steps = chosen(
        length=args.train_length,
        batch=args.batch,
        latent_lr=args.latent_lr,
        scale_lr=args.scale_lr,
    )
    ways = chosen(
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


if __name__ == "__main__":
    sys.exit(main())
