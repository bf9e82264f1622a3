"""Calibration text that the dense model writes itself, for models whose training text is unknown.

Sampled without temperature or truncation from the model's own distribution, as in LLM-QAT (arXiv
2305.17888): each sequence begins with a random token of the vocabulary.
"""

import hashlib
import json
import logging
from typing import Any

import torch

from converters.calibration import CACHE, CalibrationError, Text
from converters.fitting.distill import load_dense
from converters.sources import Source

logger = logging.getLogger(__name__)

PREFIX = "self:"
BATCH = 16  # sequences that are written side by side
LENGTH = 512  # tokens of one sequence


def self_text(source: Source, tokenizer: Any, name: str, seed: int) -> Text:
    """Text of about N tokens by the dense model, generated once and kept in the user's cache.

    Args:
        source: the dense source.
        tokenizer: its tokenizer.
        name: `self:N`.
        seed: of the sampling.

    Raises:
        CalibrationError: if N is not a positive number.
    """
    count = name.removeprefix(PREFIX)
    if not count.isdigit() or int(count) < 1:
        raise CalibrationError(f"--calibration {name}: expected self:N with N tokens to write.")
    file = CACHE / f"{_key(source, int(count), seed)}.txt"
    if not file.exists():
        logger.info("the dense model writes %s tokens of calibration text", count)
        dense = load_dense(source, torch.bfloat16, use_cache=True)
        text = generate(dense, tokenizer, int(count), seed)
        CACHE.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    return Text(name, file.read_text(encoding="utf-8"))


def generate(model: Any, tokenizer: Any, tokens: int, seed: int) -> str:
    """Sample sequences until there are `tokens` tokens; join them by blank lines."""
    length = min(LENGTH, model.config.max_position_embeddings)
    end = tokenizer.eos_token_id or 0
    pieces: list[str] = []
    written = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while written < tokens:
            count = min(BATCH, -(-(tokens - written) // length))
            start = torch.randint(len(tokenizer), (count, 1), device=model.device)
            rows = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                pad_token_id=end,
            )
            pieces += tokenizer.batch_decode(rows, skip_special_tokens=True)
            written += int((rows != end).sum())  # a sequence may end early
            logger.info("  %d of %d tokens", min(written, tokens), tokens)
    return "\n\n".join(pieces)


def _key(source: Source, tokens: int, seed: int) -> str:
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.store.files]
    content = json.dumps([str(source.path.resolve()), files, tokens, seed, LENGTH])
    return f"self-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
