// The table of functions that every instruction set implements, and the layouts that they share.
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
// K is padded to a multiple of this.
constexpr int kPad = 64;
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
//     uint16 word[ceil(N/32)][Kpad/16][32]
//
// A word holds 16 consecutive weights of one row, as in the checkpoint. The row of lane L is
// lane_row(L): with it, unpacking the words of two columns within 128-bit lanes gives 32
// weights a row, with the rows in order.
constexpr int lane_row(int lane) {
    return 16 * (lane % 8 / 4) + 4 * (lane / 8) + lane % 4;
}

struct Kernels {
    const char* name;
    // Up to this many tokens the tables are faster than the matrix product.
    int max_table_tokens;

    // out[n] = float(x[n]), then zeros up to `padded`.
    void (*to_float)(const void* x, int dtype, int n, int padded, float* out);

    // out[t] = sum over n <= kChunk of x[t * ldx + i] * r[i], for T <= kTokens tokens.
    void (*dot)(const float* x, int64_t ldx, int T, const void* r, int dtype, int n, float* out);

    // t[t * ldx + i] = x[t * ldx + i] * sum_e G[t * E + e] * s_in[e * lds + i] for i < n, zero up
    // to `padded`. max_bits[t] becomes at least the bits of every absolute value.
    void (*mix)(const float* x, int64_t ldx, int T, const void* s_in, int64_t lds, int dtype,
                int64_t E, const float* G, int n, int padded, float* t, int32_t* max_bits);

    // Quantize t[Kpad] to q << shift with |q| <= 2047 and tabulate the sums of four of them:
    //     lut[Kpad/4][16]: entry b is the sum of +q where a bit of b is 1 and -q where it is 0
    //     factor[Kpad/16][2]: 1 << shift in the low half of the first, high half of the second
    void (*tables)(const float* t, int64_t Kpad, float inverse, int16_t* lut, int32_t* factor);

    // total[blocks][32]: the sum of +-q << shift over K, of `blocks` <= kUnit blocks of rows.
    // `next` is what will be read after `words`, to be fetched meanwhile, or null.
    void (*gemv)(const uint16_t* words, int blocks, int64_t Kpad, const int16_t* lut,
                 const int32_t* factor, const uint16_t* next, int32_t* total);

    // Quantize t[Kpad] into `planes` planes of signed bytes, plane p at A + p * stride:
    //     A[Kpad/64][16][64], of which this is one row (A points at it)
    // Byte 4 * i + j of 32 is the weight 8 * j + i of 32. sums[p] is the sum of plane p.
    void (*digits)(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A,
                   int64_t stride, int32_t* sums);

    // B[Kpad/64][2][16][64] bytes of 0 and 1: row i of 16 has four weights of 16 rows each, in the
    // order of A's bytes.
    void (*expand)(const uint16_t* words, int64_t Kpad, uint8_t* B);

    // C[tiles][16][32] = A[tiles][Kpad/64][16][64] @ B; only `rows` rows of a tile are needed.
    void (*gemm)(const int8_t* A, int tiles, int rows, int64_t Kpad, const uint8_t* B, int32_t* C);
    // What a thread does before its first and after its last gemm.
    void (*begin)(void* state);
    void (*end)(void* state);

    // y[n] = (total * unit) * (sum_e G[e] * s_out[e][32]) + bias; n <= 32, bias may be null.
    // For planes > 0, total is the sum over p of (2 * C[p * plane_stride] - sums[p]) << 8 * p.
    void (*finish)(const int32_t* C, int64_t plane_stride, int planes, const int32_t* sums,
                   float unit, const float* G, int64_t E, const float* s_out, const float* bias,
                   int n, void* y, int dtype);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels amx_parts;  // gemm, begin and end; the rest is that of AVX-512

// Bytes that Kernels::begin may keep until Kernels::end.
constexpr int kStateBytes = 64;

// The largest quantized value of a mode, which its balanced base-256 digits can hold.
constexpr float mode_limit(int planes) {
    return planes == 1 ? 127.0f : planes == 2 ? 32624.0f : 1073741824.0f;
}
// In the default mode a group of 16 activations keeps twelve bits: |q| <= kMantissa, so that the
// sum of 16 of them fits 16 bits.
constexpr int kMantissa = 2047;

}  // namespace bmos
