"""Calibration text that the dense model writes itself, for models whose training text is unknown.

Sampled without temperature or truncation from the model's own distribution, as in LLM-QAT (arXiv
2305.17888): each sequence begins with a random token of the vocabulary. vLLM writes where it is
installed, else transformers; `self:N:vllm` and `self:N:transformers` choose.
"""

import hashlib
import json
import logging
from typing import Any

import torch

from converters.calibration import CACHE, CalibrationError, Text, write_whole
from converters.fitting.distributed import device
from converters.fitting.models import load_dense
from converters.fitting.precision import model_dtype
from converters.fitting.vllm_writer import (
    LENGTH,
    Sequences,
    enough,
    reason_against,
    write_with_vllm,
)
from converters.sources import Source

logger = logging.getLogger(__name__)

PREFIX = "self:"
VLLM, TRANSFORMERS = "vllm", "transformers"
VERSION = 2  # of how text is written: another number writes it anew
BATCH = 16  # sequences that transformers writes side by side


def self_text(source: Source, tokenizer: Any, name: str, seed: int) -> Text:
    """Text of about N tokens by the dense model, generated once and kept in the user's cache.

    Args:
        source: the dense source.
        tokenizer: its tokenizer.
        name: `self:N`, `self:N:vllm` or `self:N:transformers`.
        seed: of the sampling.

    Raises:
        CalibrationError: if the name is another, or vLLM cannot write.
    """
    count, _, asked = name.removeprefix(PREFIX).partition(":")
    if not count.isdigit() or int(count) < 1 or asked not in ("", VLLM, TRANSFORMERS):
        raise CalibrationError(
            f"--calibration {name}: expected self:N with N tokens to write, self:N:{VLLM} or "
            f"self:N:{TRANSFORMERS}."
        )
    against = reason_against(source.path)
    if asked == VLLM and against:
        raise CalibrationError(f"--calibration {name}: {against}. Give self:{count}.")
    writer = asked or (TRANSFORMERS if against else VLLM)
    file = CACHE / f"{_key(source, int(count), seed, writer)}.txt"
    if not file.exists():
        because = f", as {against}" if against and not asked else ""
        logger.info("the dense model writes %s tokens with %s%s", count, writer, because)
        task = (len(tokenizer), int(count), seed)
        if writer == VLLM:
            rows = write_with_vllm(source.path, *task)
        else:
            rows = write_with_transformers(source, *task)
        text = "\n\n".join(tokenizer.batch_decode(rows, skip_special_tokens=True))
        write_whole(file, text.encode())
    return Text(name, file.read_text(encoding="utf-8"))


def write_with_transformers(source: Source, vocabulary: int, tokens: int, seed: int) -> Sequences:
    """Sample about `tokens` tokens from the dense model; see `enough`."""
    import transformers

    model = load_dense(source, model_dtype(), use_cache=True).to(device())
    length = min(LENGTH, model.config.max_position_embeddings)
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) - {None}
    # Nothing of the source's own way of generating (a penalty of repetitions, say) but its end.
    model.generation_config = transformers.GenerationConfig(eos_token_id=end)

    def write(starts: list[int]) -> Sequences:
        result: Sequences = []
        for i in range(0, len(starts), BATCH):
            first = torch.tensor(starts[i : i + BATCH], device=model.device)[:, None]
            rows = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                pad_token_id=min(ends, default=0),
            )
            result += [until_end(row, ends) for row in rows.tolist()]
            logger.info("  %d of %d sequences", len(result), len(starts))
        return result

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return enough(write, vocabulary, tokens, seed)


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """A sequence without the padding behind its end; its first token may be anything."""
    stop = next((i for i, token in enumerate(row[1:], 1) if token in ends), len(row))
    return row[: stop + 1]


def _key(source: Source, tokens: int, seed: int, writer: str) -> str:
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.store.files]
    place = str(source.path.resolve())
    content = json.dumps([VERSION, place, files, tokens, seed, LENGTH, writer])
    return f"self-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
