# mypy: disable-error-code="no-untyped-def"
"""The GPU kernels of a BinaryMoS layer. `launch.py` calls them; docs/KERNELS.md explains them.

    route     G[S,M,E] = softmax(logits);  xs[S,M,blocks,16,64] = x * (G @ S_in), in bit planes
    scale     the same for many tokens, from `logits`
    gemm      y[M,N] = (B @ xs) * (G @ S_out) + bias, the signs B unpacked in registers
    dequant   B as floats, in the order of xs, for a vendor GEMM
    finish    y[M,N] = (products of that GEMM) * (G @ S_out) + bias
    logits    the router alone: before `scale`, and for a row-parallel layer, whose partial logits
              are summed first

Letters: M tokens, N outputs, K inputs, E experts, S shards. A row of signs is KW words of 16 bits,
K padded to KP = 128*KB inputs so that rows start on 16 bytes; passing KB and not KW is what tells
the compiler so. Each shard's rows are padded to a multiple of ROWS.

Rounded to x's dtype are the logits, G, G @ S_in, xs, G @ S_out and y, as in the authors' layer;
everything between is float32.

Bit planes: xs[s, m, b, i, j] is the input that meets bit i of word 64*b + j, k = 16*(64*b + j) + i,
and zero behind K. The weights stay as the checkpoint packs them; it is the small activation that is
permuted, once a token. Blocks of 64 words make the distance between planes a constant.
"""

import triton
import triton.language as tl

from vllm_bmos.kernels.triton.signs import dot, round_to, unpack_pair

ROWS = tl.constexpr(128)
"""Rows of each shard are padded to a multiple of this, so a tile never spans two shards."""

BLOCK_WORDS = tl.constexpr(64)
BLOCK = tl.constexpr(16 * 64)
"""Words and inputs of a block of xs."""

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
    gate = tl.load(g + tokens * E + e, mask=token_mask, other=0.0).to(tl.float32)
    return total + scale[:, None] * gate[None, :]


@triton.jit
def _mix_s_out(s_out, g, cols, col_mask, tokens, token_mask, N, E: tl.constexpr):
    """(G @ S_out).T for a tile, rounded to G's dtype: float32 [columns, tokens].

    `g` points at this shard's G[M,E].
    """
    total = tl.zeros([cols.shape[0], tokens.shape[0]], tl.float32)
    if E <= UNROLLED_EXPERTS:
        for e in tl.static_range(E):
            total = _mix_expert(total, s_out, g, e, cols, col_mask, tokens, token_mask, N, E)
    else:
        for e in tl.range(E, num_stages=1):
            total = _mix_expert(total, s_out, g, e, cols, col_mask, tokens, token_mask, N, E)
    return round_to(total, g.dtype.element_ty).to(tl.float32)


@triton.jit
def _logits(
    x, router, tokens, token_mask, K, KP, E: tl.constexpr, E_PAD: tl.constexpr, BK: tl.constexpr
):
    """Logits x @ router.T of a few tokens: float32 [tokens, E_PAD]. `router` points at R[E,KP]."""
    e = tl.arange(0, E_PAD)[None, :, None]
    total = tl.zeros([tokens.shape[0], E_PAD, BK], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=2):
        k = k0 + tl.arange(0, BK)
        row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
        values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        k = k[None, None, :]
        weights = tl.load(router + e * KP + k, mask=(e < E) & (k < KP), other=0.0)
        total += values.to(tl.float32)[:, None, :] * weights.to(tl.float32)
    return tl.sum(total, axis=2)


@triton.jit(do_not_specialize=["M"])
def logits(x, router, out, M, K, KB, BT: tl.constexpr, BK: tl.constexpr):
    """out[M,S*E] = x[M,K] @ router[S*E,KP].T in float32. Grid: (ceil(M/BT), S*E).

    One program computes one logit of BT tokens. That x is read once an expert costs less than
    tiles [tokens, E, K] do, whose sums go across threads.
    """
    column, columns = tl.program_id(1), tl.num_programs(1)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < M
    KP = KB * 128
    total = tl.zeros([BT, BK], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=2):
        k = k0 + tl.arange(0, BK)
        row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
        values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        weights = tl.load(router + column * KP + k, mask=k < KP, other=0.0)
        total += values.to(tl.float32) * weights.to(tl.float32)[None, :]
    tl.store(out + tokens * columns + column, tl.sum(total, axis=1), mask=token_mask)


@triton.jit
def _gates(scores, e, E: tl.constexpr, DTYPE: tl.constexpr):
    """G = softmax(scores) over the first E of [tokens, E_PAD], rounded as the authors do."""
    scores = round_to(scores, DTYPE).to(tl.float32)
    scores = tl.where((e < E)[None, :], scores, float("-inf"))
    gates = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return round_to(gates / tl.sum(gates, axis=1)[:, None], DTYPE)


@triton.jit(do_not_specialize=["M"])
def route(
    x, given_logits, router, s_in, xs, even_sums, g, M, K, KB, S: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """xs[S,M,blocks,16,64], even_sums[S,M] and g[S,M,E] from x[M,K] and R, S_in [S,E,KP].

    The logits are given (float32 [M,S,E]), or computed here where `given_logits` is None. xs and g
    have x's dtype.
    `even_sums` is the sum of the inputs that even bits meet. Grid: (ceil(M/BT), S).
    """
    shard = tl.program_id(1)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < M
    KP = KB * 128
    e = tl.arange(0, E_PAD)
    e_mask = token_mask[:, None] & (e < E)[None, :]
    if E == 1:
        scores = tl.zeros([BT, E_PAD], tl.float32)  # a single gate is 1, whatever its logit
    elif given_logits is None:
        scores = _logits(x, router + shard * E * KP, tokens, token_mask, K, KP, E, E_PAD, BK)
    else:
        given = given_logits + (tokens[:, None] * S + shard) * E + e[None, :]
        scores = tl.load(given, mask=e_mask, other=0.0)
    DTYPE: tl.constexpr = x.dtype.element_ty
    gates = _gates(scores, e, E, DTYPE)
    rows = shard * M + tokens.to(tl.int64)
    tl.store(g + rows[:, None] * E + e[None, :], gates, mask=e_mask)
    gates = gates.to(tl.float32)

    BW: tl.constexpr = BK // 16
    i = tl.arange(0, 16)[None, :, None]
    even = tl.zeros([BT, BW, 16], tl.float32)
    KX = tl.cdiv(KP, BLOCK) * BLOCK
    for k0 in tl.range(0, KX, BK, num_stages=2):
        k = k0 + tl.arange(0, BK)
        row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
        values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        scales = tl.load(
            s_in + (shard * E + e[:, None]) * KP + k[None, :],
            mask=(e < E)[:, None] & (k < KP)[None, :],
            other=0.0,
        ).to(tl.float32)
        scale = tl.sum(gates[:, :, None] * scales[None, :, :], axis=1)
        scale = round_to(scale, DTYPE).to(tl.float32)
        scaled = round_to(values.to(tl.float32) * scale, DTYPE).reshape(BT, BW, 16)
        even += scaled.to(tl.float32)
        word = k0 // 16 + tl.arange(0, BW)[None, None, :]
        place = rows[:, None, None] * KX + (word // BLOCK_WORDS) * BLOCK
        place += i * BLOCK_WORDS + word % BLOCK_WORDS
        mask = token_mask[:, None, None] & (word * 16 < KX)
        tl.store(xs + place, scaled.permute(0, 2, 1), mask=mask)
    by_bit = tl.sum(even, axis=1)
    by_bit = tl.where((tl.arange(0, 16) % 2 == 0)[None, :], by_bit, 0.0)
    tl.store(even_sums + rows, tl.sum(by_bit, axis=1), mask=token_mask)


@triton.jit
def _mix_s_in(total, s_in, gates, e, expert, k, KP):
    gate = tl.sum(tl.where((e == expert)[None, :], gates, 0.0), axis=1)
    scale = tl.load(s_in + expert * KP + k, mask=k < KP, other=0.0).to(tl.float32)
    return total + gate[:, None] * scale[None, :]


@triton.jit(do_not_specialize=["M"])
def scale(
    x, logits, s_in, xs, even_parts, g, M, K, KB, E: tl.constexpr, E_PAD: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """What `route` computes, for many tokens, from logits[M,S,E]: a program a block of inputs.

    even_parts[S,M,blocks] is each block's part of `even_sums`. Grid: (ceil(M/BT), S, blocks).
    """
    shard, S = tl.program_id(1), tl.num_programs(1)
    block, blocks = tl.program_id(2), tl.num_programs(2)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < M
    DTYPE: tl.constexpr = x.dtype.element_ty
    e = tl.arange(0, E_PAD)
    e_mask = token_mask[:, None] & (e < E)[None, :]
    given = logits + (tokens[:, None] * S + shard) * E + e[None, :]
    gates = _gates(tl.load(given, mask=e_mask, other=0.0), e, E, DTYPE)
    rows = shard * M + tokens.to(tl.int64)
    if block == 0:
        tl.store(g + rows[:, None] * E + e[None, :], gates, mask=e_mask)
    gates = gates.to(tl.float32)

    KP = KB * 128
    k = block * BLOCK + tl.arange(0, BLOCK)
    row = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
    values = tl.load(row, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
    total = tl.zeros([BT, BLOCK], tl.float32)
    s_in += shard * E * KP
    if E <= UNROLLED_EXPERTS:
        for expert in tl.static_range(E):
            total = _mix_s_in(total, s_in, gates, e, expert, k, KP)
    else:
        for expert in tl.range(E, num_stages=1):
            total = _mix_s_in(total, s_in, gates, e, expert, k, KP)
    mixed = round_to(total, DTYPE).to(tl.float32)
    scaled = round_to(values.to(tl.float32) * mixed, DTYPE)
    bit = tl.arange(0, BLOCK) % 16
    even = tl.where((bit % 2 == 0)[None, :], scaled.to(tl.float32), 0.0)
    tl.store(even_parts + rows * blocks + block, tl.sum(even, axis=1), mask=token_mask)
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, BLOCK_WORDS)[None, None, :]
    place = (rows * blocks + block)[:, None, None] * BLOCK + i * BLOCK_WORDS + j
    planes = scaled.reshape(BT, BLOCK_WORDS, 16).permute(0, 2, 1)
    tl.store(xs + place, planes, mask=token_mask[:, None, None])


@triton.jit
def _epilogue(
    even_sums, s_out, g, bias, shard, col, col_mask, tokens, token_mask, M, N, biased,
    E: tl.constexpr,
):  # fmt: skip
    """What turns products into y: even_sums [tokens], G @ S_out [columns, tokens], bias [columns].

    There is no bias where `biased` is 0, the number of columns that have one.
    """
    surplus = tl.load(even_sums + shard * M + tokens, mask=token_mask, other=0.0)
    scale = _mix_s_out(s_out, g + shard * M * E, col, col_mask, tokens, token_mask, N, E)
    shift = tl.load(bias + col, mask=col_mask & (col < biased), other=0.0).to(tl.float32)
    return surplus, scale, shift


# A KB of 1 as a constant would leave no loop, and all 16 tiles of a step in registers at once.
@triton.jit(do_not_specialize=["M", "KB", "biased"])
def gemm(
    xs, even_sums, words, s_out, g, bias, y, M, N, KB, sizes, biased, E: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BKW: tl.constexpr, NACC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[M,N] from xs and even_sums of `route`, words[N_pad,KW], s_out[E,N], g[S,M,E], bias[biased].

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
    tokens = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    token_mask = tokens < M
    w_tile = words + (row + n)[:, None] * KW + j[None, :]
    KX = tl.cdiv(KW, BLOCK_WORDS) * BLOCK
    x_tile = xs + (shard * M + tokens)[None, :] * KX + j[:, None]

    col = row - first_row + n
    col_mask = col < size
    col += first_col
    # A small tile has registers to spare: its scales arrive while the first weights do.
    EARLY: tl.constexpr = BN * BM <= 512
    if EARLY:
        surplus, scale, shift = _epilogue(
            even_sums, s_out, g, bias, shard, col, col_mask, tokens, token_mask, M, N, biased, E
        )
    acc0 = tl.zeros([BN, BM], tl.float32)
    acc1 = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    acc3 = tl.zeros([BN, BM], tl.float32)
    for j0 in range(0, KW, BKW):
        w = tl.load(w_tile + j0, mask=(j < KW - j0)[None, :], other=0)
        planes = x_tile + (j0 + j0 // BLOCK_WORDS * (BLOCK - BLOCK_WORDS))
        for p in tl.static_range(8):
            odd, even = unpack_pair(w, p, DTYPE, ASM)
            plane = planes + 2 * p * BLOCK_WORDS
            x_even = tl.load(plane, mask=token_mask[None, :], other=0.0)
            x_odd = tl.load(plane + BLOCK_WORDS, mask=token_mask[None, :], other=0.0)
            if NACC == 1:
                acc0 = dot(even, x_even, acc0)
                acc0 = dot(odd, x_odd, acc0)
            elif NACC == 2 or p % 2 == 0:
                acc0 = dot(even, x_even, acc0)
                acc1 = dot(odd, x_odd, acc1)
            else:
                acc2 = dot(even, x_even, acc2)
                acc3 = dot(odd, x_odd, acc3)
    acc = (acc0 + acc2) + (acc1 + acc3)

    if not EARLY:
        surplus, scale, shift = _epilogue(
            even_sums, s_out, g, bias, shard, col, col_mask, tokens, token_mask, M, N, biased, E
        )
    out = round_to((acc - surplus[None, :]) * scale + shift[:, None], y.dtype.element_ty)
    mask = col_mask[:, None] & token_mask[None, :]
    tl.store(y + tokens[None, :] * N + col[:, None], out, mask=mask)


@triton.jit
def dequant(words, out, KB, BN: tl.constexpr):
    """out[rows,blocks,16,64] = +-2**SIGN_EXPONENT from words[rows,KW]. Grid: (rows/BN, blocks)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    KW = KB * 8
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    j = tl.arange(0, BLOCK_WORDS)[None, :]
    word = tl.program_id(1) * BLOCK_WORDS + j
    w = tl.load(words + n * KW + word, mask=word < KW, other=0)
    magnitude: tl.constexpr = 2.0**SIGN_EXPONENT
    block = out + (n * tl.num_programs(1) + tl.program_id(1)) * BLOCK + j
    for i in tl.static_range(16):
        signs = tl.where((w >> i) & 1 != 0, magnitude, -magnitude)
        tl.store(block + i * BLOCK_WORDS, round_to(signs, DTYPE))


# The shard is a number, as a pointer to its gates would be aligned for some M and not for others,
# and a kernel of its own for these would be compiled while serving.
@triton.jit(do_not_specialize=["M", "biased", "shard"])
def finish(
    products, s_out, g, bias, y, M, N, first_col, cols, biased, shard, E: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y[:, first_col:][:, :cols] = products[M,cols] * 2**-SIGN_EXPONENT * (G @ S_out) + bias.

    Of g[S,M,E] the gates of one shard are used. Grid: (ceil(cols/BN), ceil(M/BM)).
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    col_mask, token_mask = n < cols, tokens < M
    mask = col_mask[:, None] & token_mask[None, :]
    row = tokens.to(tl.int64)[None, :]
    acc = tl.load(products + row * cols + n[:, None], mask=mask, other=0.0).to(tl.float32)
    col = first_col + n
    scale = _mix_s_out(s_out, g + shard * M * E, col, col_mask, tokens, token_mask, N, E)
    shift = tl.load(bias + col, mask=col_mask & (col < biased), other=0.0).to(tl.float32)
    unscale: tl.constexpr = 2.0**-SIGN_EXPONENT
    out = round_to(acc * (scale * unscale) + shift[:, None], y.dtype.element_ty)
    tl.store(y + row * N + col[:, None], out, mask=mask)
