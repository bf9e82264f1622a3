"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes.

    Args:
        what: a verb for the log.
        total: bytes to come.
        done: bytes that an earlier run did.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done, self._start = what, total, done, done
        self._began = self._last = time.monotonic()
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    def add(self, count: int) -> None:
        """Note `count` more bytes."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            speed = (self.done - self._start) / (now - self._began)
            logger.info(
                "%s: %.0f %% of %.2f GB, %.0f MB/s, %.0f s left",
                self.what,
                100 * self.done / self.total,
                self.total / 1e9,
                speed / 1e6,
                (self.total - self.done) / speed,
            )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
