"""Where a fit works: `DST.fit`, locked, resumable, one file per finished piece.

DST.fit/fingerprint.json           what is fitted, on what, with which options
DST.fit/<stage>/<piece>.safetensors    appears whole, by a rename, when the piece is done
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load, save

from converters.workspace import TargetError
from vllm_bmos.checkpoint.writer import write_bytes, write_json

FINGERPRINT = "fingerprint.json"
Tensors = dict[str, torch.Tensor]


class FitFolder:
    """The exclusive right to fit one DST.

    Args:
        target: DST.
        facts: all that determines the result, as JSON; a resumed run must have the same.
        resume: whether to continue an interrupted run.
        owner: whether this process has the right; another one of the same run only reads.

    Raises:
        TargetError: if another process works on it, or what was interrupted was another fit.
    """

    def __init__(
        self, target: Path, facts: dict[str, Any], resume: bool, owner: bool = True
    ) -> None:
        self.root = self.path(target)
        self._lock = -1
        if not owner:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(facts, resume)
        except BlockingIOError:
            os.close(self._lock)
            raise TargetError(f"Another process is fitting {self.root}. Wait for it.") from None
        except BaseException:
            os.close(self._lock)
            raise

    def _check(self, facts: dict[str, Any], resume: bool) -> None:
        text = json.dumps(facts, sort_keys=True).encode()
        now = {"sha256": hashlib.sha256(text).hexdigest(), "facts": facts}
        file = self.root / FINGERPRINT
        if file.exists():
            if not resume:
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

    @staticmethod
    def delete(root: Path) -> None:
        """Remove everything: the result has been published."""
        shutil.rmtree(root)

    def __enter__(self) -> "FitFolder":
        """Enter."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        if self._lock >= 0:
            os.close(self._lock)
