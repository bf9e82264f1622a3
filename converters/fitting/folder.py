"""Where a fit works: `DST.fit`, locked, resumable, one file per finished piece.

DST.fit/fingerprint.json           what is fitted, on what, with which options
DST.fit/<stage>/<piece>.safetensors    appears whole, by a rename, when the piece is done
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from typing_extensions import override

from converters.locked import LockedFolder, TargetError
from vllm_bmos.checkpoint.writer import write_bytes, write_json

FINGERPRINT = "fingerprint.json"
Tensors = dict[str, torch.Tensor]


class FitFolder(LockedFolder):
    """The exclusive right to fit one DST.

    Args:
        target: DST.
        facts: all that determines the result, as JSON; a resumed run must have the same.
        resume: whether to continue an interrupted run.

    Raises:
        TargetError: if another process works on it, or what was interrupted was another fit.
    """

    marker = FINGERPRINT

    def __init__(self, target: Path, facts: dict[str, Any], resume: bool) -> None:
        super().__init__(self.path(target))
        self._facts, self._resume = facts, resume

    @override
    def opened(self) -> None:
        text = json.dumps(self._facts, sort_keys=True).encode()
        now = {"sha256": hashlib.sha256(text).hexdigest(), "facts": self._facts}
        file = self.root / FINGERPRINT
        if file.exists():
            if not self._resume:
                raise TargetError(
                    f"{self.root} holds an interrupted fit. Pass --resume to continue it, or "
                    "delete that directory to start again."
                )
            if json.loads(file.read_text())["sha256"] != now["sha256"]:
                raise TargetError(
                    f"{self.root} holds a fit of another source, on other text or with other "
                    f"options (see {FINGERPRINT}). Repeat it as it was, or delete that directory."
                )
        write_json(file, now)

    def read(self, stage: str, piece: str) -> Tensors | None:
        """The tensors of a finished piece, or None."""
        file = self._file(stage, piece)
        return load(file.read_bytes()) if file.exists() else None

    def write(self, stage: str, piece: str, tensors: Tensors) -> None:
        """Note a finished piece."""
        file = self._file(stage, piece)
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, save({name: t.contiguous() for name, t in tensors.items()}))

    def directory(self, stage: str) -> Path:
        """A stage's own directory, for what it keeps itself."""
        path = self.root / stage
        path.mkdir(exist_ok=True)
        return path

    def _file(self, stage: str, piece: str) -> Path:
        return self.root / stage / f"{piece}.safetensors"

    @staticmethod
    def path(target: Path) -> Path:
        """DST.fit."""
        return target.with_name(target.name + ".fit")
