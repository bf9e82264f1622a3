"""Files of packages on PyPI, without PyPI."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from converters.package_data import PackageError, read_members


@pytest.fixture
def pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds `data==1.0` only."""

    def pip(line: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder, package = line[-2:]
        if package != "data==1.0":
            return subprocess.CompletedProcess(line, 1, "", f"no {package} here")
        with zipfile.ZipFile(Path(folder) / "data-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("data/a/one.txt", "one")
            wheel.writestr("data/b/two.txt", "two")
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)


def test_files_come_in_the_order_asked_for(pypi: None) -> None:
    assert read_members("data==1.0", ["b/two.txt", "one.txt"]) == [b"two", b"one"]


def test_what_is_missing_is_named(pypi: None) -> None:
    with pytest.raises(PackageError, match=r"data==1\.0 has no three\.txt"):
        read_members("data==1.0", ["one.txt", "three.txt"])
    with pytest.raises(PackageError, match=r"other==2\.0 from PyPI: no other==2\.0 here"):
        read_members("other==2.0", ["one.txt"])
