import io
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

# The benchmarks are scripts: they find each other in their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

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
