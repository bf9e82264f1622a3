"""One fuzzing step over everything that reads foreign files, driven by bytes.

A valid source or checkpoint is damaged as the bytes say (edited JSON, spliced or cut files, links)
and then converted or verified. The only ways out are success and a clean error; after an error
there is neither a target nor a changed source. hypothesis drives it in `test_fuzz.py`; with atheris
installed, coverage drives it:

    python -m tests.converters.fuzz --seconds 600
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from converters.options import Options
from converters.pipeline import convert
from converters.plan import make_plan
from converters.sources.torch_bin import read_bin
from tests.checkpoint.build import build
from tests.converters.models import make_official, make_onebit
from vllm_bmos.checkpoint import FormatError
from vllm_bmos.checkpoint.container import read_extents
from vllm_bmos.checkpoint.verify import verify

# Values that JSON can hold and that nobody expects.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**80, 1e400, float("nan"), 0.5, "", "x", "4",
    "../x", "/etc/passwd", "\x00", "é" * 300, [], [[]], [0], ["a", "a"], {}, {"a": {}}, [None] * 50,
]  # fmt: skip
CLEAN = (FormatError, OSError)


class Choices:
    """Small decisions read from bytes; when they run out, every decision is 0."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes, or fewer."""
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        return int.from_bytes(self.bytes(3), "little") % limit


@cache
def bases() -> dict[str, dict[str, bytes]]:
    """The files of a valid source or checkpoint of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        made = [
            make_official(path / "official", shard_bytes=40_000),
            make_official(path / "bin", shard_bytes=40_000, as_bin=True),
            make_onebit(path / "onebit", packed=True),
            build(path / "packed", max_shard_size=200),
        ]
        return {
            base.name: {file.name: file.read_bytes() for file in sorted(base.iterdir())}
            for base in made
        }


def step(data: bytes) -> None:
    """Damage, convert or verify, check.

    Raises:
        Exception: whatever is not a clean error is a finding.
    """
    choices = Choices(data)
    kind = sorted(bases())[choices.below(len(bases()))]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as top:
        source, target = Path(top) / "source", Path(top) / "target"
        source.mkdir()
        for name, content in bases()[kind].items():
            (source / name).write_bytes(content)
        for _ in range(1 + choices.below(3)):
            damage(source, choices)
        before = snapshot(source)
        try:
            read(kind, source, target)
        except CLEAN as error:
            assert "\n" not in str(error), f"more than a sentence: {error}"
            assert sorted(os.listdir(top)) == ["source"], "an error left something behind"
        assert snapshot(source) == before, "the source was changed"


def read(kind: str, source: Path, target: Path) -> None:
    """Convert or verify it, and read each data file by itself."""
    for file in sorted(source.iterdir()):
        reader = {".safetensors": read_extents, ".bin": read_bin}.get(file.suffix)
        if reader is not None and file.is_file():
            try:
                reader(file)
            except CLEAN:
                continue
    if kind == "packed":
        verify(source)
    else:
        convert(make_plan(source, Options()), target, workers=1)
        verify(target)


def snapshot(path: Path) -> dict[str, bytes | str]:
    """What a directory holds; links are not followed."""
    return {
        file.name: os.readlink(file) if file.is_symlink() else file.read_bytes()
        for file in path.iterdir()
        if file.is_symlink() or file.is_file()
    }


def damage(path: Path, choices: Choices) -> None:
    """Do one thing to one file."""
    names = sorted(file.name for file in path.iterdir())
    file = path / names[choices.below(len(names))]
    if file.is_symlink() or not file.is_file():
        return
    content = file.read_bytes()
    kind = choices.below(8)
    if kind < 3 and file.suffix == ".json":
        try:
            value = json.loads(content)
        except ValueError:
            return
        edit(value, choices)
        file.write_text(json.dumps(value))
    elif kind < 3 and file.suffix == ".safetensors" and len(content) > 8:
        length = int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8 : 8 + length])
        except ValueError:
            return
        edit(header, choices)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif kind == 3:
        file.write_bytes(content[: choices.below(len(content) + 1)])
    elif kind == 4:
        file.unlink()
        if choices.below(2):
            file.symlink_to(["/etc/passwd", "/dev/zero", file.name, "nowhere"][choices.below(4)])
    else:
        position = choices.below(len(content) + 1)
        removed = choices.below(9)
        added = choices.bytes(choices.below(9))
        file.write_bytes(content[:position] + added + content[position + removed :])


def edit(value: Any, choices: Choices) -> None:
    """Change, drop or rename one entry somewhere in a JSON value."""
    for _ in range(choices.below(5)):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        inner = [v for v in inner if isinstance(v, dict | list) and v]
        if not inner:
            break
        value = inner[choices.below(len(inner))]
    if not value:
        return
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key, odd = keys[choices.below(len(keys))], ODD[choices.below(len(ODD))]
    action = choices.below(3)
    if action == 0:
        value[key] = odd
    elif action == 1:
        del value[key]
    elif isinstance(value, dict):
        value[str(odd)] = value.pop(key)


def main() -> None:
    """Fuzz for a while, guided by coverage."""
    import atheris

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", help="directory that keeps what was learnt")
    args = parser.parse_args()
    corpus = args.corpus or tempfile.mkdtemp()
    logging.disable(logging.CRITICAL)
    bases()
    steps, began = 0, time.monotonic()

    def counted(data: bytes) -> None:
        nonlocal steps
        steps += 1
        step(data)
        if time.monotonic() - began > args.seconds:
            print(f"{steps} steps in {args.seconds} s, no finding")
            sys.stdout.flush()
            os._exit(0)

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("converters", "vllm_bmos.checkpoint")):
            for name, function in list(vars(module).items()):
                if getattr(function, "__module__", None) == module.__name__ and callable(function):
                    if not isinstance(function, type):
                        setattr(module, name, atheris.instrument_func(function))
    limits = ["-max_len=64", "-len_control=0", "-timeout=120", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], corpus, *limits], counted)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
