"""Tile sizes by GPU architecture and number of tokens: a table, so that serving never tunes.

The table is `configs.json` beside this file. An architecture without an entry of its own uses
"default". Each entry is a list of tiles in the order of the largest M that they serve; more tokens
than the last one serves go to the vendor GEMM. VLLM_BMOS_TRITON_CONFIGS names a JSON file of the
same form whose entries replace those of the table. Under VLLM_BATCH_INVARIANT=1 (vLLM's switch)
one tile serves every M, so that a token's sums do not depend on its batch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

CONFIGS_ENV = "VLLM_BMOS_TRITON_CONFIGS"
BATCH_INVARIANT_ENV = "VLLM_BATCH_INVARIANT"
BATCH_INVARIANT = "batch_invariant"  # an entry of the table
TABLE_FILE = Path(__file__).with_name("configs.json")
MAX_ROWS = 128


@dataclass(frozen=True)
class Tile:
    """One launch configuration of the `gemm` kernel.

    Attributes:
        M: the most tokens that this tile serves, or None for any number.
        BN: outputs of a program: a power of two from 16 to 128.
        BM: tokens of a program: a power of two from 8.
        BKW: 16-bit words of a row in one step; a step covers 16*BKW inputs.
        NACC: independent accumulators, 1, 2 or 4.
        warps: warps of a program. On sm_90 and sm_100 fewer than 4 means mma.sync.
        stages: depth of the asynchronous copy pipeline.
        registers: the most a thread may use, a multiple of 8. Left to itself the assembler aims at
            an occupancy that shared memory does not allow anyway, and spills for it.
    """

    M: int | None
    BN: int
    BM: int
    BKW: int
    NACC: int
    warps: int
    stages: int
    registers: int

    def __post_init__(self) -> None:
        allowed = {
            "BN": (16, 32, 64, MAX_ROWS),
            "BM": (8, 16, 32, 64, 128, 256),
            "BKW": (16, 32, 64),
            "NACC": (1, 2, 4),
            "warps": (1, 2, 4, 8),
            "stages": (1, 2, 3, 4, 5, 6),
            "registers": (*range(32, 256, 8), 255),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {values}, found {getattr(self, name)!r}")
        if self.M is not None and not (isinstance(self.M, int) and self.M >= 1):
            raise ValueError(f"M: expected a positive integer or null, found {self.M!r}")


def parse_table(table: Mapping[str, Any], source: str) -> dict[str, tuple[Tile, ...]]:
    """Check a table of tiles.

    Raises:
        ValueError: naming the file, the entry and the field that is wrong.
    """
    known = [field.name for field in fields(Tile)]
    parsed: dict[str, tuple[Tile, ...]] = {}
    for name, rows in table.items():
        if not isinstance(rows, list):
            raise ValueError(f"{source}: {name}: expected a list of tiles, found {rows!r}")
        tiles: list[Tile] = []
        for index, row in enumerate(rows):
            where = f"{source}: {name}[{index}]"
            if not isinstance(row, dict) or sorted(row) != sorted(known):
                raise ValueError(f"{where}: expected the fields {known}, found {row!r}")
            try:
                tile = Tile(**row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if tiles and (tiles[-1].M is None or (tile.M is not None and tile.M <= tiles[-1].M)):
                raise ValueError(f"{where}: M must grow from tile to tile, null last")
            tiles.append(tile)
        if not tiles:
            raise ValueError(f"{source}: {name} has no tile")
        if name == BATCH_INVARIANT and [tile.M for tile in tiles] != [None]:
            raise ValueError(f"{source}: {name}: expected one tile with M null, which serves any M")
        parsed[name] = tuple(tiles)
    return parsed


@cache
def table() -> dict[str, tuple[Tile, ...]]:
    """The table of this process: the shipped one, with the entries of the user's file on top."""
    found = parse_table(json.loads(TABLE_FILE.read_text()), TABLE_FILE.name)
    override = os.environ.get(CONFIGS_ENV)
    if override:
        source = f"{CONFIGS_ENV}={override}"
        try:
            user_table = json.loads(Path(override).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{source}: cannot read this table of tiles: {error}") from None
        if not isinstance(user_table, dict):
            raise ValueError(f"{source}: expected an object of tile lists by architecture")
        found |= parse_table(user_table, source)
    return found


@cache
def batch_invariant() -> bool:
    """Whether a token's sums must not depend on its batch."""
    return os.environ.get(BATCH_INVARIANT_ENV, "0") not in ("", "0")


@cache
def tiles_for(arch: int) -> tuple[Tile, ...]:
    """The tiles of an architecture, such as 86 for compute capability 8.6."""
    if batch_invariant():
        return table()[BATCH_INVARIANT]
    # Tensor memory, which limits a tile, is alike in all GPUs of 10.x and 11.x.
    family = 100 if 100 <= arch < 120 else arch
    return table().get(f"sm_{arch}", table().get(f"sm_{family}", table()["default"]))


def tile_for(arch: int, M: int) -> Tile | None:
    """The tile for M tokens, or None where the vendor GEMM is better."""
    return next((tile for tile in tiles_for(arch) if tile.M is None or tile.M >= M), None)
