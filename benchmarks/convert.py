"""The converter at scale: wall time, MB/s of source, peak memory, and kills with resumption.

    python benchmarks/convert.py DIR --size 7b --kills 3
    python benchmarks/convert.py DIR --size 7b --kind dense --kills 0   # the speed of svid

makes a synthetic checkpoint in DIR (unless it is there), reads it and writes as many bytes
as the result has (the limit that no converter can pass), converts it, and then kills conversions
at random moments and resumes them, comparing every byte with the undisturbed result. DIR needs
room for the source and two results. The page cache is as it comes: warm, where memory allows.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import REPOSITORY, common_parser, machine_facts, print_facts, run_of, start, write_json
from make_official import SIZES, make

EXPERTS = {"official": 4, "dense": 0}
CHUNK = 8 << 20
CONVERTER = [sys.executable, str(REPOSITORY / "converters/hf_to_bmos.py")]


def tree_bytes(path: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in path.iterdir())


def sums(path: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
        for file in sorted(path.iterdir())
    }


def plain_copy(source: Path, scratch: Path, size: int, threads: int) -> float:
    """Seconds to read the source and to write and sync `size` bytes, with as many threads."""

    def read(file: Path) -> None:
        with file.open("rb", buffering=0) as handle:
            buffer = bytearray(CHUNK)
            while handle.readinto(buffer):
                pass

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, sorted(source.glob("*.safetensors"))))
    with scratch.open("wb") as handle:
        for _ in range(size // CHUNK + 1):
            handle.write(bytes(CHUNK))
        os.fsync(handle.fileno())
    seconds = time.monotonic() - began
    scratch.unlink()
    return seconds


def convert(source: Path, target: Path, *flags: str) -> dict[str, float]:
    """Convert in a process of its own; its wall time and peak resident memory."""
    began = time.monotonic()
    command = [*CONVERTER, str(source), str(target), "--quiet", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    usage = run_of(process)
    if process.returncode != 0:
        raise SystemExit(f"the conversion of {source} ended with status {process.returncode}")
    return {
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def kill_and_resume(source: Path, target: Path, jobs: int, seed: int) -> dict[str, Any]:
    """Kill a conversion after a random number of its jobs; resume it."""
    after = random.Random(seed).randrange(jobs)
    journal = target.with_name(target.name + ".partial") / "journal.jsonl"
    process = subprocess.Popen([*CONVERTER, str(source), str(target), "--quiet"])
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    killed = process.returncode == -signal.SIGKILL
    if process.returncode and not killed:
        raise SystemExit(f"the conversion of {source} ended with status {process.returncode}")
    began = time.monotonic()
    if killed:
        convert(source, target, "--resume")
    return {"after": after, "killed": killed, "resume_seconds": time.monotonic() - began}


def main() -> None:
    """Run the command line."""
    parser = common_parser((__doc__ or "").partition("\n")[0], "convert.json")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("directory", type=Path, help="where source and results go")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--kind", choices=EXPERTS, default="official", help="of the source")
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    start(args.threads)
    facts = machine_facts(args.threads)
    print_facts(facts)
    source, target = args.directory / f"{args.kind}-{args.size}", args.directory / "packed"
    if not source.exists():
        make(source, args.size, experts=EXPERTS[args.kind])
    for leftover in args.directory.glob("packed*"):
        shutil.rmtree(leftover)
    source_bytes = tree_bytes(source)
    run = convert(source, target)
    packed_bytes = tree_bytes(target)
    plain = plain_copy(source, args.directory / "scratch", packed_bytes, args.threads)
    wanted, again = sums(target), args.directory / "packed-again"
    jobs = SIZES[args.size]["num_hidden_layers"] * 9 + 3
    kills = []
    for seed in range(args.kills):
        kill = kill_and_resume(source, again, jobs, seed)
        if sums(again) != wanted:
            raise SystemExit(f"a conversion differs from an undisturbed one: {kill}")
        if kill.pop("killed"):  # else it ended before its kill
            kills.append(kill)
        shutil.rmtree(again)
    if args.kills and not kills:
        raise SystemExit("every conversion ended before its kill; take a larger --size")
    result = {
        "machine": facts,
        "size": args.size,
        "kind": args.kind,
        "source_bytes": source_bytes,
        "packed_bytes": packed_bytes,
        **run,
        "source_mb_per_second": source_bytes / run["seconds"] / 1e6,
        "plain_read_write_seconds": plain,
        "kills": kills,
    }
    print(
        f"{source_bytes / 1e9:.2f} GB -> {packed_bytes / 1e9:.3f} GB in {run['seconds']:.1f} s, "
        f"{result['source_mb_per_second']:.0f} MB/s of source (plain copy: {plain:.1f} s), "
        f"peak {run['peak_rss_bytes'] / 1e9:.2f} GB; {len(kills)} of {args.kills} conversions "
        "killed before their end, all resumed to the same bytes"
    )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
