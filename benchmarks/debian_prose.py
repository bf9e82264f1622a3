"""Calibration text from books that Debian ships: other prose, where no data set can be reached.

Three packages hold 18 million characters of English that may be copied: a book of questions and
answers on history and politics, Jane Austen's six novels, and a dictionary of computing. They are
of another kind than Wikipedia's articles and the web's pages; docs/FITTING.md says what a student
gained by them and what not.

    python benchmarks/debian_prose.py FOLDER --exclude wiki.test.raw
    python converters/hf_to_bmos.py SRC DST --stage qat --calibration FOLDER/austen.txt ...

The first is written in WikiText's format, the others as they are. Needs apt-get and dpkg-deb, and
`pip install -e '.[eval]'`.
"""

import argparse
import gzip
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from wikitext_like import ngrams, run, tokenised, write

from converters.package_data import PackageError

HEADING = 150  # characters: a paragraph as short may be a heading, a menu or a list item
ENTRY = 200  # characters: a dictionary's entry as short is a reference
SPACE = re.compile(r"\s+")


class Book(NamedTuple):
    """A package's text.

    Attributes:
        package: its name.
        files: pattern of the paths in it.
        paragraphs: of all those files' contents.
        wikitext: whether it is written in WikiText's format.
    """

    package: str
    files: str
    paragraphs: Callable[[list[bytes]], Iterable[str]]
    wikitext: bool


class DebianError(PackageError):
    """A package cannot be had, or is not what it was. The message names it."""


class _Paragraphs(HTMLParser):
    BLOCKS = frozenset("p div li ul ol h1 h2 h3 h4 h5 blockquote br td tr title".split())
    SKIPPED = frozenset("script style head nav footer form".split())

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.skipped += tag in self.SKIPPED
        self._end(tag)

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in self.SKIPPED
        self._end(tag)

    def _end(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(SPACE.sub(" ", data))


def of_html(pages: list[bytes]) -> list[str]:
    """The long paragraphs of HTML pages; what is on several pages counts once."""
    found: dict[str, None] = {}
    for page in pages:
        parser = _Paragraphs()
        parser.feed(page.decode("utf-8", errors="replace"))
        found |= dict.fromkeys(_split("".join(parser.parts), HEADING))
    return list(found)


def of_dictionary(files: list[bytes]) -> list[str]:
    """The long paragraphs of dictd's databases, without the braces around their links."""
    text = "".join(gzip.decompress(data).decode("utf-8", errors="replace") for data in files)
    return [re.sub("[{}]", "", p) for p in _split(text, ENTRY)]


def of_r_data(files: list[bytes]) -> Iterator[str]:
    """The paragraphs of the character vectors, lines of text, in R's lazy-load databases.

    Such a file is a row of objects: the size of each (4 bytes, big-endian) before its zlib stream.
    """
    from rdata.parser import RObjectType, parse_data

    for data in files:
        while data:
            stream = zlib.decompressobj()
            content = stream.decompress(data[4:])
            if len(content) != struct.unpack(">I", data[:4])[0]:
                raise DebianError("an R database with a wrong size of an object")
            vector = parse_data(content, extension=".rds").object
            if vector.info.type == RObjectType.STR:
                lines = ((s.value or b"").decode("utf-8", errors="replace") for s in vector.value)
                yield from _split("\n".join(lines), 0)
            data = stream.unused_data


def _split(text: str, over: int) -> list[str]:
    """What blank lines separate and is longer than `over` characters, each on one line."""
    paragraphs = (SPACE.sub(" ", part).strip() for part in re.split(r"\n\s*\n", text))
    return [p for p in paragraphs if len(p) > over]


BOOKS = {
    "anarchism": Book("anarchism", "usr/share/doc/anarchism/html/*.html", of_html, True),
    "foldoc": Book("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", of_dictionary, False),
    "austen": Book(
        "r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", of_r_data, False
    ),
}


def read(book: Book) -> list[bytes]:
    """Download a package and read files of it, in the order of their names; nothing is installed.

    Raises:
        DebianError: if apt-get cannot have it, or it has no such files.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = (
            f"apt-get download -o APT::Sandbox::User=root {book.package}",
            "dpkg-deb -x *.deb .",
        )
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise DebianError(f"{book.package}: {command}: {done.stderr.strip()[-300:]}")
        files = sorted(Path(folder).glob(book.files))
        if not files:
            raise DebianError(f"{book.package} has no {book.files}")
        return [file.read_bytes() for file in files]


def text_of(book: Book, contents: list[bytes], excluded: set[tuple[str, ...]]) -> str:
    """A book's paragraphs that share no run of words with what is excluded."""
    paragraphs = [p for p in book.paragraphs(contents) if excluded.isdisjoint(ngrams(p))]
    if not book.wikitext:
        return "\n\n".join(paragraphs)
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer("en")
    return "\n\n\n".join(f" {tokenised(p, moses).strip()} " for p in paragraphs)


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for anarchism.txt, austen.txt and foldoc.txt")

    def work(args: Any, excluded: set[tuple[str, ...]]) -> None:
        for name, book in BOOKS.items():
            write(args.folder / f"{name}.txt", text_of(book, read(book), excluded))

    run(parser, work)


if __name__ == "__main__":
    main()
