"""What the user asks of a conversion."""

import re
from dataclasses import dataclass

from vllm_bmos.checkpoint.format import FormatError


@dataclass(frozen=True)
class Options:
    """The choices of the command line.

    Attributes:
        experts: E, for sources that have no experts of their own.
        stage: fitting stage, for dense sources.
        ignore: patterns of linear layers to leave as they are.
        scale_dtype: float16, bfloat16 or float32; None takes the source's own choice.
        max_shard_size: limit in bytes for the data of one output file.

    Raises:
        FormatError: if a pattern is not a regular expression.
    """

    experts: int = 4
    stage: str = "svid"
    ignore: tuple[str, ...] = ()
    scale_dtype: str | None = None
    max_shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FormatError(
                    f"ignore: {pattern!r} is not a regular expression: {error}."
                ) from None

    def ignores(self, module: str) -> bool:
        """Whether a pattern is found anywhere in the module's name."""
        return any(re.search(pattern, module) for pattern in self.ignore)
