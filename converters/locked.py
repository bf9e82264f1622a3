"""A directory that one process at a time works in."""

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self


class TargetError(Exception):
    """DST cannot be written. The message says why and what to do."""


class LockedFolder:
    """Creates a directory when entered and holds it until left, or until the process dies.

    Args:
        root: the directory.

    Attributes:
        marker: the first file that is written into such a directory, and its last one to go.

    Raises:
        TargetError: when entered, if another process holds it, or it is something else's.
    """

    marker: ClassVar[str]

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def stranger(cls, root: Path) -> str | None:
        """A file in a directory that is not of this kind; None if it is, or empty."""
        names = sorted(entry.name for entry in root.iterdir())
        if cls.marker in names:
            return None
        return next((name for name in names if not name.startswith(cls.marker)), None)

    @classmethod
    def delete(cls, root: Path) -> None:
        """Remove a directory of this kind, if it is there; one of something else stays.

        The marker goes last, so that what a kill leaves of it is of this kind still.
        """
        if not root.is_dir() or cls.stranger(root) is not None:
            return
        for entry in list(root.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != cls.marker:
                entry.unlink()
        (root / cls.marker).unlink(missing_ok=True)
        root.rmdir()

    def opened(self) -> None:
        """Called with the lock held: take over or refuse what is there."""

    def closing(self, error: BaseException | None) -> None:
        """Called before the lock is let go, with what ended the work early, if anything."""

    def __enter__(self) -> Self:
        """Lock, or say that another process has."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.root, os.O_RDONLY)
        try:
            self._lock()
            stranger = self.stranger(self.root)
            if stranger is not None:
                raise TargetError(
                    f"{self.root} holds {stranger}, which the converter has not written; it works "
                    "in a directory of that name. Move it, or choose another DST."
                )
            self.opened()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have removed it in between.
            if os.stat(self.root).st_ino == os.fstat(self._descriptor).st_ino:
                return
        except (BlockingIOError, FileNotFoundError):
            pass
        raise TargetError(
            f"Another process is working in {self.root}. Wait for it, or choose another DST."
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        try:
            self.closing(error)
        finally:
            os.close(self._descriptor)
