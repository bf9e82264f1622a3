"""The calibration text from Debian's packages."""

import gzip
import struct
import zlib
from pathlib import Path

import debian_prose
import pytest
from debian_prose import BOOKS, DebianError, of_dictionary, of_html, of_r_data, text_of

LONG = "It was a long and rather well-known sentence, of which there was more. " * 4
LONG = LONG.strip()


def r_object(*lines: str) -> bytes:
    """A character vector as in R's lazy-load databases: size, zlib stream."""
    content = b"X\n" + struct.pack(">iii", 2, 0x40000, 0x20300)
    content += struct.pack(">ii", 16, len(lines))  # STRSXP
    for line in lines:
        content += struct.pack(">ii", 0x40009, len(line)) + line.encode()  # CHARSXP
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_html_gives_its_long_paragraphs_once():
    page = f"<html><head><title>x</title></head><body><p>Short</p><p>{LONG}<br></p>"
    page += f"<script>{LONG}</script><ul><li>An\n <b>other</b>: {LONG}</li></ul></body></html>"
    assert of_html([page.encode(), page.encode()]) == [LONG, f"An other: {LONG}"]


def test_a_dictionary_gives_its_long_entries():
    text = f"kiln\n   a {{b}}\n\nkiln\n   See {{oven}}.\n   {LONG}\n\n"
    assert of_dictionary([gzip.compress(text.encode())]) == [f"kiln See oven. {LONG}"]


def test_an_r_database_gives_the_paragraphs_of_its_vectors():
    data = r_object("Chapter 1", "", "One line", "and the next.") + r_object("Another book.")
    assert list(of_r_data([data])) == ["Chapter 1", "One line and the next.", "Another book."]
    with pytest.raises(DebianError, match="wrong size"):
        list(of_r_data([b"\0\0\0\1" + data[4:]]))


def test_paragraphs_of_the_measured_text_are_left_out():
    other = "Nothing at all of this is in the text that a student is measured on later. " * 4
    page = f"<p>{LONG}</p><p>{other}</p>".encode()
    measured = debian_prose.ngrams(f"He said: {LONG.upper()}")
    plain = BOOKS["anarchism"]._replace(wikitext=False)
    assert text_of(plain, [page], set()) == f"{LONG}\n\n{other.strip()}"
    assert text_of(plain, [page], measured) == other.strip()
    assert " well @-@ known sentence , of " in text_of(BOOKS["anarchism"], [page], set())


def test_a_package_without_the_files_is_named(monkeypatch):
    class Done:
        returncode, stderr = 0, ""

    monkeypatch.setattr("subprocess.run", lambda *_, **__: Done())
    with pytest.raises(DebianError, match=r"dict-foldoc has no usr/share/dictd"):
        debian_prose.read(BOOKS["foldoc"])


def test_a_package_that_cannot_be_had_is_named(monkeypatch, tmp_path: Path):
    book = BOOKS["foldoc"]._replace(package="no-such-package-of-debian")
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get either
    with pytest.raises(DebianError, match="no-such-package-of-debian: apt-get"):
        debian_prose.read(book)


def test_the_command_ends_with_one_line_that_says_why(monkeypatch, tmp_path: Path, capsys):
    def unreachable(book: debian_prose.Book) -> list[bytes]:
        raise DebianError(f"{book.package}: no such package")

    monkeypatch.setattr(debian_prose, "read", unreachable)
    monkeypatch.setattr("sys.argv", ["debian_prose.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        debian_prose.main()
    assert capsys.readouterr().err == "debian_prose.py: anarchism: no such package\n"
    assert list(tmp_path.iterdir()) == []
