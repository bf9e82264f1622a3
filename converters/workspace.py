"""Where a conversion works until it is complete: `DST.partial`, locked, journalled, resumable.

    DST.partial/journal.jsonl   the plan's fingerprint, then one line per finished job
    DST.partial/checkpoint/     becomes DST in one rename when everything is written and verified

A job's line holds the sha256 of each tensor that it wrote. A resumed run trusts a line only if
the bytes on the disk still have these sums, so no crash at any moment can leave a wrong tensor.
"""

import json
import os
from pathlib import Path
from typing import Any

from typing_extensions import override

from converters.locked import LockedFolder, TargetError
from vllm_bmos.checkpoint.format import FormatError
from vllm_bmos.checkpoint.writer import write_bytes


def work_directory(target: Path) -> Path:
    """DST.partial."""
    return target.with_name(target.name + ".partial")


JOURNAL = "journal.jsonl"


class Workspace(LockedFolder):
    """The exclusive right to write one DST.

    Args:
        target: DST.
        fingerprint: of the plan.
        resume: whether to continue an interrupted run.

    Attributes:
        checkpoint: the directory to write into.
        finished: the journal's lines, by job name.

    Raises:
        TargetError: if DST exists, another converter works on it, or what was interrupted was not
            this same conversion.
    """

    marker = JOURNAL

    def __init__(self, target: Path, fingerprint: str, resume: bool) -> None:
        check_free(target)
        super().__init__(work_directory(target))
        self.target = target
        self.checkpoint = self.root / "checkpoint"
        self.finished: dict[str, dict[str, Any]] = {}
        self._fingerprint, self._resume = fingerprint, resume
        self._journal_file = self.root / JOURNAL

    @override
    def opened(self) -> None:
        if any(self.root.iterdir()):
            self._continue(self._fingerprint, self._resume)
        lines = [{"fingerprint": self._fingerprint}, *self.finished.values()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_bytes(self._journal_file, text.encode())
        self._journal = self._journal_file.open("a")
        self.checkpoint.mkdir(exist_ok=True)

    @override
    def closing(self, error: BaseException | None) -> None:
        """What is worth nothing to a resumed run does not stay behind."""
        self._journal.close()
        if isinstance(error, FormatError) or not self.finished:
            self.delete(self.root)

    def _continue(self, fingerprint: str, resume: bool) -> None:
        if not resume:
            raise TargetError(
                f"{self.root} holds an interrupted conversion. Pass --resume to continue it, or "
                "delete that directory to start again."
            )
        lines = _read_journal(self._journal_file)
        if lines and lines[0].get("fingerprint") != fingerprint:
            raise TargetError(
                f"{self.root} holds an interrupted conversion of another source or with other "
                "options. Repeat it with the same source and options, or delete that directory."
            )
        self.finished = {line["job"]: line for line in lines[1:]}

    def record(self, line: dict[str, Any]) -> None:
        """Note a finished job."""
        self.finished[line["job"]] = line
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()

    def publish(self) -> None:
        """Make the finished checkpoint appear as DST, whole."""
        sync_directory(self.checkpoint)
        os.rename(self.checkpoint, self.target)
        sync_directory(self.target.parent)
        self._journal_file.unlink()
        self.root.rmdir()


def check_free(target: Path) -> None:
    """Raise TargetError unless `target` does not exist or is an empty directory."""
    if target.is_symlink() or is_mount(target):
        raise TargetError(
            f"{target} is a {'link' if target.is_symlink() else 'mount point'}, which the result "
            "cannot replace. Name a directory inside it."
        )
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise TargetError(f"{target} exists already. Delete it or choose another name.")


def is_mount(path: Path) -> bool:
    """Whether something is mounted there, be it another folder of the same file system."""
    table = Path("/proc/self/mountinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return os.path.ismount(path) or str(path.resolve()) in {line.split()[4] for line in lines}


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's lines, up to one that a crash cut short."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
