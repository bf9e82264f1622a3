"""From a layer's tensors to kernel launches: shapes, grids and buffers, and nothing else.

Every grid and buffer follows from shapes alone, so a launch never waits for the GPU and can be
captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
from torch.nn.functional import pad

from vllm_bmos.kernels.base import LinearTensors
from vllm_bmos.kernels.triton import kernels
from vllm_bmos.kernels.triton.configs import Tile, batch_invariant, tile_for
from vllm_bmos.kernels.triton.signs import NATIVE

BLOCK_K = 128  # inputs are padded to this: 8 words, 16 bytes
WORD = 16  # signs in a word
FEW_TOKENS = 64  # up to which one program a token does all that comes before the product
ROUTE_ELEMENTS = 1024  # of a tile in a warp of the router kernels: 32 registers a thread
SCALE_TOKENS = 4  # of a program of `scale`
DEQUANT_BYTES = 1 << 26  # of dequantised signs at a time
INTERPRETED_ARCH = 80  # whose tiles the interpreter runs


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Every launch passes here, so that a test can record it instead."""
    kernel[grid](*args, enable_fp_fusion=True, **options)


def prepare(tensors: LinearTensors, shard_sizes: tuple[int, ...], K: int) -> LinearTensors:
    """Pad a layer's tensors to whole blocks.

    Returns:
        weight as int16 words [N_pad, KW], each shard's rows padded to a multiple of 128;
        in_channel_scale and router_weight [S, E, KP] with zeros behind K; out_channel_scale as is.
    """
    KP = round_up(K, BLOCK_K)
    rows = [
        pad(shard, (0, KP // 8 - shard.shape[1], 0, -shard.shape[0] % kernels.ROWS.value))
        for shard in tensors.weight.split(list(shard_sizes))
    ]
    return LinearTensors(
        weight=torch.cat(rows).contiguous().view(torch.int16),
        in_channel_scale=pad(tensors.in_channel_scale, (0, KP - K)).contiguous(),
        out_channel_scale=tensors.out_channel_scale.contiguous(),
        router_weight=pad(tensors.router_weight, (0, KP - K)).contiguous(),
    )


def router_logits(x: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    """Float32 [M, S, E] from x[M, K] and the padded router weights [S, E, KP]."""
    x = _aligned(x)
    M, K = x.shape
    S, E, KP = router_weight.shape
    out = x.new_empty((M, S, E), dtype=torch.float32)
    if M:
        BT, warps = 1 if _few(M) else 8, 4
        BK = min(ROUTE_ELEMENTS * warps // BT, triton.next_power_of_2(KP))
        launch(
            kernels.logits, (triton.cdiv(M, BT), S * E),
            x, router_weight, out, M, K, KP // BLOCK_K, BT=BT, BK=BK, num_warps=warps,
        )  # fmt: skip
    return out


def linear(
    x: torch.Tensor,
    logits: torch.Tensor | None,
    tensors: LinearTensors,
    bias: torch.Tensor | None,
    shard_sizes: list[int],
) -> torch.Tensor:
    """y[M, N] from x[M, K] and prepared tensors."""
    M, N = x.shape[0], sum(shard_sizes)
    y = x.new_empty((M, N))
    if M == 0:
        return y
    xs, even_sums, g = _route(_aligned(x), logits, tensors)
    tile = tile_for(arch_of(x.device), M)
    if tile is None:
        _large(xs, g, tensors, bias, shard_sizes, y)
    else:
        _tiled(xs, even_sums, g, tensors, bias, shard_sizes, y, tile)
    return y


def _route(
    x: torch.Tensor, logits: torch.Tensor | None, tensors: LinearTensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scaled inputs xs[S, M, KX], their even_sums[S, M] and the gates G[S, M, E]."""
    M, K = x.shape
    S, E, KP = tensors.in_channel_scale.shape
    KX, E_PAD = round_up(KP, kernels.BLOCK.value), triton.next_power_of_2(E)
    xs = x.new_empty((S, M, KX))
    g = x.new_empty((S, M, E))
    if _few(M):
        even_sums = x.new_empty((S, M), dtype=torch.float32)
        warps = 16
        # One expert has tiles as long as two: longer, x and scales exceed 8.6's shared memory.
        BK = max(WORD, ROUTE_ELEMENTS * warps // max(E_PAD, 2))
        given = None if logits is None or E == 1 else _aligned(logits)
        launch(
            kernels.route, (M, S),
            x, given, tensors.router_weight,
            tensors.in_channel_scale, xs, even_sums, g, M, K, KP // BLOCK_K, S=S, E=E,
            E_PAD=E_PAD, BT=1, BK=min(BK, triton.next_power_of_2(KP)), num_warps=warps,
        )  # fmt: skip
        return xs, even_sums, g
    if logits is None:
        logits = router_logits(x, tensors.router_weight)
    blocks = KX // kernels.BLOCK.value
    even_parts = x.new_empty((S, M, blocks), dtype=torch.float32)
    launch(
        kernels.scale, (triton.cdiv(M, SCALE_TOKENS), S, blocks),
        x, _aligned(logits), tensors.in_channel_scale, xs, even_parts, g, M, K, KP // BLOCK_K,
        E=E, E_PAD=E_PAD, BT=SCALE_TOKENS, num_warps=4,
    )  # fmt: skip
    return xs, even_parts.sum(dim=-1), g


def _tiled(
    xs: torch.Tensor,
    even_sums: torch.Tensor,
    g: torch.Tensor,
    tensors: LinearTensors,
    bias: torch.Tensor | None,
    shard_sizes: list[int],
    y: torch.Tensor,
    tile: Tile,
) -> None:
    M, N = y.shape
    E, KW = g.shape[2], tensors.weight.shape[1]
    grid = (tensors.weight.shape[0] // tile.BN, triton.cdiv(M, tile.BM))
    launch(
        kernels.gemm, grid,
        xs, even_sums, tensors.weight, tensors.out_channel_scale, g, y if bias is None else bias, y,
        M, N, KW * WORD // BLOCK_K, tuple(shard_sizes), 0 if bias is None else N,
        E=E, BN=tile.BN, BM=tile.BM, BKW=tile.BKW, NACC=tile.NACC, ASM=_inline_asm(),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def _large(
    xs: torch.Tensor,
    g: torch.Tensor,
    tensors: LinearTensors,
    bias: torch.Tensor | None,
    shard_sizes: list[int],
    y: torch.Tensor,
) -> None:
    """Many tokens: dequantise a part of the rows, multiply with the vendor GEMM, scale."""
    M, N = y.shape
    E, KW, KX = g.shape[2], tensors.weight.shape[1], xs.shape[2]
    ROWS, BN, BM = kernels.ROWS.value, 32, 64
    part = max(1, DEQUANT_BYTES // (KX * xs.element_size() * ROWS)) * ROWS
    row, col = 0, 0
    for shard, (scaled, size) in enumerate(zip(xs.unbind(), shard_sizes, strict=True)):
        for first in range(0, size, part):
            cols = min(part, size - first)
            rows = round_up(cols, BN)
            signs = xs.new_empty((rows, KX))
            words = tensors.weight.narrow(0, row + first, rows)
            launch(
                kernels.dequant, (rows // BN, KX // kernels.BLOCK.value),
                words, signs, KW * WORD // BLOCK_K, BN=BN,
            )  # fmt: skip
            products = scaled @ signs.narrow(0, 0, cols).T
            launch(
                kernels.finish, (triton.cdiv(cols, BM), triton.cdiv(M, BM)),
                products, tensors.out_channel_scale, g, y if bias is None else bias, y,
                M, N, col + first, cols, 0 if bias is None else N, shard,
                E=E, BN=BM, BM=BM, num_warps=8,
            )  # fmt: skip
        row += round_up(size, ROWS)
        col += size


def _few(M: int) -> bool:
    """Whether a program serves one token; only then do its sums not depend on the batch."""
    return M <= FEW_TOKENS or batch_invariant()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Dense rows that start on 16 bytes; for others Triton would compile other kernels."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def _inline_asm() -> bool:
    return bool(NATIVE.value) and torch.version.hip is None


def arch_of(device: torch.device) -> int:
    """The architecture whose tiles run there, such as 86 for compute capability 8.6."""
    if not NATIVE.value:
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
