# mypy: disable-error-code="no-untyped-def"
"""The GPU kernels of a BinaryMoS layer. `launch.py` calls them; docs/KERNELS.md explains them.

    route     G[S,M,E] = softmax(logits);  xs[S,M,16,KW] = x * (G @ S_in), in bit planes
    gemm      y[M,N] = (B @ xs) * (G @ S_out) + bias, the signs B unpacked in registers
    dequant   B as floats, in the bit planes of xs, for a vendor GEMM
    finish    y[M,N] = (products of that GEMM) * (G @ S_out) + bias
    logits    the router alone, for a row-parallel layer whose partial logits are summed first

Letters: M tokens, N outputs, K inputs, E experts, S shards; KW = 16-bit words in a row of signs,
KB = KW/8 = blocks of 128 inputs. Rows of signs are padded to whole blocks, so every row of `words`
and of `xs` starts on 16 bytes; passing KB and not KW is what tells the compiler so. Each shard's
rows are padded to ROWS.

Bit planes: xs[s, m, i, j] is the input that meets bit i of word j, k = 16*j + i. The weights stay
as the checkpoint packs them; it is the small activation that is permuted, once a token.
"""

import triton
import triton.language as tl

from vllm_bmos.kernels.triton.signs import dot, round_to, unpack

ROWS = tl.constexpr(128)
"""Rows of each shard are padded to a multiple of this, so a tile never spans two shards."""

SIGN_EXPONENT = tl.constexpr(-6)
"""`dequant` writes +-2**-6: float16 products of a vendor GEMM then stay far from its overflow."""

UNROLLED_EXPERTS = tl.constexpr(8)
"""Up to this many experts the loads of all are in flight at once."""


@triton.jit
def _locate(row, sizes):
    """The shard of a padded row: (index, first padded row, first column of y, columns)."""
    shard, first_row, first_col, size = 0, 0, 0, sizes[0]
    next_row, next_col = 0, 0
    for s in tl.static_range(len(sizes)):
        inside = row >= next_row
        shard = tl.where(inside, s, shard)
        first_row = tl.where(inside, next_row, first_row)
        first_col = tl.where(inside, next_col, first_col)
        size = tl.where(inside, sizes[s], size)
        next_row += tl.cdiv(sizes[s], ROWS) * ROWS
        next_col += sizes[s]
    return shard, first_row, first_col, size


@triton.jit
def _mix_expert(total, s_out, g, e, cols, col_mask, tokens, token_mask, N, E: tl.constexpr):
    scale = tl.load(s_out + e * N + cols, mask=col_mask, other=0.0).to(tl.float32)
    gate = tl.load(g + tokens * E + e, mask=token_mask, other=0.0)
    return total + scale[:, None] * gate[None, :]


@triton.jit
def _mix_s_out(s_out, g, cols, col_mask, tokens, token_mask, N, E: tl.constexpr):
    """(G @ S_out).T for a tile: float32 [columns, tokens]. `g` points at this shard's G[M,E]."""
    total = tl.zeros([cols.shape[0], tokens.shape[0]], tl.float32)
    if E <= UNROLLED_EXPERTS:
        for e in tl.static_range(E):
            total = _mix_expert(total, s_out, g, e, cols, col_mask, tokens, token_mask, N, E)
    else:
        for e in tl.range(E, num_stages=1):
            total = _mix_expert(total, s_out, g, e, cols, col_mask, tokens, token_mask, N, E)
    return total


@triton.jit
def _logits(
    x, router, tokens, token_mask, K, KP, E: tl.constexpr, E_PAD: tl.constexpr, BK: tl.constexpr
):
    """Logits x @ router.T of a few tokens: float32 [tokens, E_PAD]. `router` points at R[E,KP]."""
    e = tl.arange(0, E_PAD)[None, :, None]
    total = tl.zeros([tokens.shape[0], E_PAD, BK], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
        values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        k = k[None, None, :]
        weights = tl.load(router + e * KP + k, mask=(e < E) & (k < KP), other=0.0)
        total += values.to(tl.float32)[:, None, :] * weights.to(tl.float32)
    return tl.sum(total, axis=2)


@triton.jit(do_not_specialize=["M"])
def logits(
    x, router, out, M, K, KB, S: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M,S,E] = x[M,K] @ router[S,E,KP].T in float32. Grid: (ceil(M/BT), S)."""
    shard = tl.program_id(1)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    KP = KB * 128
    values = _logits(x, router + shard * E * KP, tokens, tokens < M, K, KP, E, E_PAD, BK)
    e = tl.arange(0, E_PAD)[None, :]
    mask = (tokens < M)[:, None] & (e < E)
    tl.store(out + (tokens[:, None] * S + shard) * E + e, values, mask=mask)


@triton.jit(do_not_specialize=["M"])
def route(
    x, given_logits, router, s_in, xs, g, M, K, KB, S: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """xs[S,M,16,KW] and g[S,M,E] from x[M,K] and R, S_in [S,E,KP]. Grid: (ceil(M/BT), S).

    The logits are given (float32 [M,S,E]), or computed here where `given_logits` is None.
    """
    shard = tl.program_id(1)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < M
    KP, KW = KB * 128, KB * 8
    e = tl.arange(0, E_PAD)
    if given_logits is None:
        scores = _logits(x, router + shard * E * KP, tokens, token_mask, K, KP, E, E_PAD, BK)
    else:
        scores = tl.load(
            given_logits + (tokens[:, None] * S + shard) * E + e[None, :],
            mask=token_mask[:, None] & (e < E)[None, :],
            other=0.0,
        )
    scores = tl.where((e < E)[None, :], scores, float("-inf"))
    gates = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    gates = gates / tl.sum(gates, axis=1)[:, None]
    rows = shard * M + tokens.to(tl.int64)
    g_mask = token_mask[:, None] & (e < E)[None, :]
    tl.store(g + rows[:, None] * E + e[None, :], gates, mask=g_mask)

    BW: tl.constexpr = BK // 16
    for k0 in range(0, KP, BK):
        k = k0 + tl.arange(0, BK)
        row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
        values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        scales = tl.load(
            s_in + (shard * E + e[:, None]) * KP + k[None, :],
            mask=(e < E)[:, None] & (k < KP)[None, :],
            other=0.0,
        ).to(tl.float32)
        scale = tl.sum(gates[:, :, None] * scales[None, :, :], axis=1)
        scaled = round_to(values.to(tl.float32) * scale, xs.dtype.element_ty)
        planes = scaled.reshape(BT, BW, 16).permute(0, 2, 1)
        i = tl.arange(0, 16)[None, :, None]
        j = k0 // 16 + tl.arange(0, BW)[None, None, :]
        where = xs + (rows[:, None, None] * 16 + i) * KW + j
        tl.store(where, planes, mask=token_mask[:, None, None] & (j < KW))


@triton.jit(do_not_specialize=["M", "biased"])
def gemm(
    xs, words, s_out, g, bias, y, M, N, KB, sizes, biased, E: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BKW: tl.constexpr, NACC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[M,N] from xs[S,M,16,KW], words[N_pad,KW], s_out[E,N], g[S,M,E], bias[N].

    Grid: (N_pad/BN, ceil(M/BM)). One program computes BN outputs of one shard for BM tokens: y.T =
    B @ xs.T, with the signs as the left operand, the one that every MMA takes from registers. A
    tile of words serves 16 MMA steps, one a bit plane. NACC independent accumulators shorten the
    chain of dependent MMAs that a small tile would wait for.
    """
    DTYPE: tl.constexpr = xs.dtype.element_ty
    KW = KB * 8
    row = tl.program_id(0) * BN
    shard, first_row, first_col, size = _locate(row, sizes)
    n = tl.arange(0, BN)
    j = tl.arange(0, BKW)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    token_mask = tokens < M
    w_tile = words + (row + n)[:, None] * KW + j[None, :]
    x_tile = xs + (shard * M + tokens)[None, :] * (KW * 16) + j[:, None]

    acc0 = tl.zeros([BN, BM], tl.float32)
    acc1 = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    acc3 = tl.zeros([BN, BM], tl.float32)
    for j0 in range(0, KW, BKW):
        inside = j < KW - j0
        w = tl.load(w_tile + j0, mask=inside[None, :], other=0)
        for i in tl.static_range(16):
            x_mask = inside[:, None] & token_mask[None, :]
            x = tl.load(x_tile + (i * KW + j0), mask=x_mask, other=0.0)
            signs = unpack(w, i, DTYPE, ASM)
            if i % NACC == 0:
                acc0 = dot(signs, x, acc0)
            elif i % NACC == 1:
                acc1 = dot(signs, x, acc1)
            elif i % NACC == 2:
                acc2 = dot(signs, x, acc2)
            else:
                acc3 = dot(signs, x, acc3)
    acc = (acc0 + acc1) + (acc2 + acc3)

    col = row - first_row + n
    col_mask = col < size
    col += first_col
    scale = _mix_s_out(s_out, g + shard * M * E, col, col_mask, tokens, token_mask, N, E)
    shift = tl.load(bias + col, mask=col_mask & (col < biased), other=0.0).to(tl.float32)
    out = round_to(acc * scale + shift[:, None], y.dtype.element_ty)
    mask = col_mask[:, None] & token_mask[None, :]
    tl.store(y + tokens[None, :] * N + col[:, None], out, mask=mask)


@triton.jit
def dequant(words, out, KB, BN: tl.constexpr, BW: tl.constexpr):
    """out[rows,16,KW] = +-2**SIGN_EXPONENT from words[rows,KW]. Grid: (rows/BN, ceil(KW/BW))."""
    KW = KB * 8
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    j = tl.program_id(1) * BW + tl.arange(0, BW)[None, :]
    w = tl.load(words + n * KW + j, mask=j < KW, other=0)
    magnitude: tl.constexpr = 2.0**SIGN_EXPONENT
    for i in tl.static_range(16):
        signs = tl.where((w >> i) & 1 != 0, magnitude, -magnitude).to(out.dtype.element_ty)
        tl.store(out + (n * 16 + i) * KW + j, signs, mask=j < KW)


@triton.jit(do_not_specialize=["M", "biased"])
def finish(
    acc, s_out, g, bias, y, M, N, first_col, cols, acc_stride, biased, E: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y[:, first_col:first_col+cols] = acc[M,cols] * 2**-SIGN_EXPONENT * (G @ S_out) + bias.

    `g` points at this shard's G[M,E]. Grid: (ceil(cols/BN), ceil(M/BM)).
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    col_mask, token_mask = n < cols, tokens < M
    mask = col_mask[:, None] & token_mask[None, :]
    row = tokens.to(tl.int64)[None, :]
    products = tl.load(acc + row * acc_stride + n[:, None], mask=mask, other=0.0).to(tl.float32)
    col = first_col + n
    scale = _mix_s_out(s_out, g, col, col_mask, tokens, token_mask, N, E)
    shift = tl.load(bias + col, mask=col_mask & (col < biased), other=0.0).to(tl.float32)
    unscale: tl.constexpr = 2.0**-SIGN_EXPONENT
    out = round_to(products * (scale * unscale) + shift[:, None], y.dtype.element_ty)
    tl.store(y + row * N + col[:, None], out, mask=mask)
