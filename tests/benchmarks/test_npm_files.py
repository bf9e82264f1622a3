"""Files of packages on npm."""

import re

import pytest
from npm_files import read_files

from converters.package_data import PackageError
from tests.benchmarks.conftest import NpmHas


def test_matching_files_are_read_by_path(npm_has: NpmHas) -> None:
    npm_has("a@1", {"package/b.txt": "two", "package/a.txt": "one \u20ac", "package/c.js": ""})
    found = read_files("a@1", re.compile(r"package/.\.txt"))
    assert list(found.items()) == [
        ("package/a.txt", "one \u20ac".encode()),
        ("package/b.txt", b"two"),
    ]


def test_a_package_without_such_files_is_named(npm_has: NpmHas) -> None:
    npm_has("a@1", {"package/README": ""})
    with pytest.raises(PackageError, match=r"a@1 from npm has no files package/c"):
        read_files("a@1", re.compile("package/c"))


def test_what_npm_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stderr = 1, "npm error 404\n"

    monkeypatch.setattr("subprocess.run", lambda *_, **__: Failed())
    with pytest.raises(PackageError, match=r"a@1 from npm: npm error 404$"):
        read_files("a@1", re.compile("package/c"))
