// The table of functions that every instruction set implements, and the layouts that they share. One
// that is faster with tables for any number of tokens has no functions for the matrix product.
//
// All paths compute the same integers and the same fp32 operations in the same order, so that
// every path, every number of threads and every batch gives the same bits.

#pragma once

#include <cstdint>

#include "bmos.h"

namespace bmos {

// Rows of the output that lie side by side in the packed weights.
constexpr int kBlock = 32;
// Tokens of one tile of activations.
constexpr int kTile = 16;
// K is padded to a multiple of this, and a row of a tile has as many bytes.
constexpr int kPad = 64;
constexpr int kRow = kPad;
constexpr int kTileBytes = kTile * kRow;
constexpr int kPanelBytes = 2 * kTileBytes;  // the bytes of kPad weights of a block of rows
// Logits are summed in chunks of K of this size, so that any split of K gives the same bits.
constexpr int kChunk = 512;
// Tokens that share one pass over the scales.
constexpr int kTokens = 4;
// Blocks of rows that share one pass over the tables.
constexpr int kUnit = 4;
// The sum of K activations of at most 32624 must fit 32 bits.
constexpr int64_t kMaxK = 65536;

// Packed weights of one shard, after the header:
//
//     uint32 dword[ceil(N/32)][Kpad/32][32]
//
// A dword holds 32 consecutive weights of one row, as in the checkpoint, and 32 rows lie side by
// side: the lanes of two AVX-512 registers. For AVX2 the bytes 0 of the 32 rows lie side by side,
// then the bytes 1, 2 and 3 (Kernels::bytewise).

// Memory for the tables of one token, which are gemv's own business.
struct Tables {
    uint8_t* sums;    // [Kpad/4][table_bytes]
    int32_t* factor;  // [Kpad/16]
};

// What is tabulated of the integers that activations become: all of them, in exact mode their parts.
enum class Part { whole, lower, upper };  // q = (upper << kPartBits) + lower
constexpr int kPartBits = 15;

// What gemv fetches into the cache while it works: the memory must not wait for the look-ups.
struct Ahead {
    const uint32_t* next;  // the words that are looked up next
    // Of the words from `part` on, so many cache lines for each 32 columns: the tokens that share a
    // unit of blocks fetch the one after it together.
    const uint32_t* part;
    int lines;
};

// The sums over K that Kernels::finish is given, C[T][kBlock] of T tokens or C[1][n] of one. For
// planes > 0, total is the sum over p of (2 * C[p * plane_stride] - sums[t, p]) << 8 * p. Else it
// is C, for planes = kTwoParts plus C[plane_stride] << kPartBits.
struct Totals {
    const int32_t* C;
    int64_t plane_stride;
    int planes;
    const int32_t* sums;
};
constexpr int kTwoParts = -2;

// What it multiplies them by. C, s_out and bias are there up to a multiple of 16.
struct OutScales {
    const float* unit;   // [T]
    const float* G;      // [T, E]
    int64_t E;
    const float* s_out;  // [E], lds apart
    int64_t lds;
    const float* bias;   // null without one
};

struct Kernels {
    const char* name;
    // Up to this many tokens, by the number of planes, tables are faster than the matrix product.
    // Only AVX2 has some for four planes.
    int64_t max_table_tokens[5];
    // The 128 bytes of 32 rows by 32 weights are byte[4][32] and not dword[32].
    bool bytewise;
    // Bytes of Tables::sums for four weights.
    int table_bytes;

    // out[n] = float(x[n]), then zeros up to `padded`.
    void (*to_float)(const void* x, int dtype, int n, int padded, float* out);

    // out[t] = sum over n <= kChunk of x[t * ldx + i] * r[i], for T <= kTokens tokens.
    void (*dot)(const float* x, int64_t ldx, int T, const void* r, int dtype, int n, float* out);

    // t[t * ldx + i] = x[t * ldx + i] * sum_e G[t * E + e] * s_in[e * lds + i] for i < n, zero up
    // to `padded`. max_bits[t] becomes at least the bits of every absolute value.
    void (*mix)(const float* x, int64_t ldx, int T, const void* s_in, int64_t lds, int dtype,
                int64_t E, const float* G, int n, int padded, float* t, int32_t* max_bits);

    // Quantize t[Kpad] to q << shift with |q| <= kMantissa, or to a part of exact mode's integers,
    // and tabulate for every four weights the sums of +q where a bit is 1 and -q where it is 0.
    // kUnit blocks of words at `next` are fetched into the cache meanwhile.
    void (*tables)(const float* t, int64_t Kpad, float inverse, Part part, Tables tables,
                   const uint32_t* next);

    // total[blocks][32]: the sum of +-q << shift over K, of `blocks` <= kUnit blocks of rows.
    void (*gemv)(const uint32_t* words, int blocks, int64_t Kpad, Tables tables, Ahead ahead,
                 int32_t* total);

    // Quantize t[Kpad] into `planes` planes of signed bytes, plane p at A + p * stride:
    //     A[Kpad/64][16][64], of which this is one row (A points at it)
    // Byte 4 * i + j of 32 is the weight 8 * j + i of 32. sums[p] is the sum of plane p.
    void (*digits)(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A,
                   int64_t stride, int32_t* sums);

    // B[width/64][2][16][64] bytes of 0 and 1 of `width` weights of 32 rows, a multiple of 64:
    // row i of 16 has four weights each of 16 rows of the layer, in the order of A's bytes.
    void (*expand)(const uint32_t* words, int64_t width, uint8_t* B);

    // C[tiles][16][32] = or += A[tiles][width/64][16][64] @ B. Tile i of A is at A + i * stride.
    // Only `rows` rows of a tile are needed; the others are there. `width` words of 32 bits at
    // `next` are fetched into the cache meanwhile, if it is not null.
    void (*gemm)(const int8_t* A, int64_t stride, int tiles, int rows, int64_t width,
                 const uint8_t* B, int32_t* C, bool add, const uint32_t* next);
    // What a thread does before its first and after its last gemm.
    void (*begin)(void* state);
    void (*end)(void* state);

    // y[t, n] = (total * unit[t]) * (sum_e G[t, e] * s_out[e, n]) + bias[n] for T tokens. Rows of
    // y are ldy bytes apart.
    void (*finish)(Totals totals, OutScales scales, int T, int n, void* y, int64_t ldy, int dtype);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels amx_parts;  // gemm, begin and end; the rest is that of AVX-512

// Bytes that Kernels::begin may keep until Kernels::end.
constexpr int kStateBytes = 64;

// The largest quantized value of a mode, which its balanced base-256 digits can hold, and parts of
// kPartBits and 16 bits.
constexpr float mode_limit(int planes) {
    return planes == 1 ? 127.0f : planes == 2 ? 32624.0f : 32767.0f * (1 << kPartBits);
}
// In the default mode a group of 16 activations keeps fourteen bits, so that the sum of four of
// them fits 16 bits.
constexpr int kMantissa = 8191;

}  // namespace bmos
