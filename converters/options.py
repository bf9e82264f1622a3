"""What the user asks of a conversion."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The choices of the command line.

    Attributes:
        experts: E, for sources that have no experts of their own.
        stage: fitting stage, for dense sources.
        ignore: patterns of linear layers to leave as they are.
        scale_dtype: float16, bfloat16 or float32; None takes the source's own choice.
        max_shard_size: limit in bytes for the data of one output file.
    """

    experts: int = 4
    stage: str = "svid"
    ignore: tuple[str, ...] = ()
    scale_dtype: str | None = None
    max_shard_size: int = 5_000_000_000

    def ignores(self, module: str) -> bool:
        """Whether a pattern is found anywhere in the module's name."""
        return any(re.search(pattern, module) for pattern in self.ignore)
