import io
import os
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

# The benchmarks are scripts: they find each other in their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A benchmark's command line sets up this process: its environment, threads and signals."""
    import torch

    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


NpmHas = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def npm_has(monkeypatch: pytest.MonkeyPatch) -> NpmHas:
    """Sets which package npm has (no other), and that package's files by path."""

    class Done:
        returncode, stderr = 0, ""

    def has(package: str, files: Mapping[str, str]) -> None:
        def npm(command: list[str], **_: object) -> Done:
            assert command[:3] == ["npm", "pack", package]
            with tarfile.open(Path(command[-1]) / "package.tgz", "w:gz") as archive:
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content.encode())
                    archive.addfile(member, io.BytesIO(content.encode()))
            return Done()

        monkeypatch.setattr("subprocess.run", npm)

    return has
