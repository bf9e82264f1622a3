"""The small files that travel with a model: tokenizer, template, generation config, licence."""

import logging
import re
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from converters.sources import Source
from converters.sources.gguf import GgufSource, made_files
from vllm_bmos.checkpoint.format import FormatError
from vllm_bmos.checkpoint.reader import inside

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
README = "README.md"
FRONT_MATTER_BYTES = 64 << 10
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Only the tokenizer needs more than kilobytes; a bound keeps a hostile directory from filling RAM.
MAX_BYTES = 256 << 20


def side_files(source: Source) -> dict[str, bytes]:
    """The side files of a source, by name; a missing tokenizer.json is built.

    Raises:
        FormatError: if one is a link out of the source, not a regular file, or far too large.
    """
    if isinstance(source, GgufSource):
        return made_files(source.path, source.config)
    files: dict[str, bytes] = {}
    for entry in sorted(source.files.iterdir()):
        if any(fnmatch(entry.name, pattern) for pattern in PATTERNS) and not entry.is_dir():
            file = inside(source.files, entry.name)
            if file.stat().st_size > MAX_BYTES:
                raise FormatError(f"{file} has more than {MAX_BYTES} bytes. Remove it.")
            files[entry.name] = file.read_bytes()
    if TOKENIZER_JSON not in files and any(name.startswith("tokenizer") for name in files):
        files |= _build_tokenizer_json(source.files)
    if not any(name.startswith(("tokenizer", "vocab")) for name in files):
        logger.warning("%s has no tokenizer: add one before serving text.", source.files)
    return files


def source_license(source: Source) -> str | None:
    """The licence that the source's own metadata or model card names.

    Raises:
        FormatError: if its README.md is a link out of the source.
    """
    if source.license is not None or not (source.files / README).is_file():
        return source.license
    with inside(source.files, README).open("rb") as file:
        head = file.read(FRONT_MATTER_BYTES).decode(errors="replace")
    matter = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", matter[1] if matter else "", re.MULTILINE)
    return found[1] if found else None


def _build_tokenizer_json(folder: Path) -> dict[str, bytes]:
    """Checkpoints that ship only tokenizer.model need the fast tokenizer that servers read."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        try:
            AutoTokenizer.from_pretrained(folder).save_pretrained(temporary)
            data = (Path(temporary) / TOKENIZER_JSON).read_bytes()
        except Exception as error:  # whatever transformers makes of the tokenizer's files
            logger.warning(
                "%s could not be built from the tokenizer's own files (%s: %s); those travel.",
                TOKENIZER_JSON,
                type(error).__name__,
                error,
            )
            return {}
    logger.info("built %s from the tokenizer's own files", TOKENIZER_JSON)
    return {TOKENIZER_JSON: data}
