// Plain C++ for any processor. One function of each kind of kernels.h; see there for the layouts.

#include "vec_portable.h"

#include "rows.h"

namespace {

using bmos::kBlock;
using bmos::kTile;

// The byte of weight k of 64 in a row of A, and its place in a column of B.
inline int place_of(int k) { return k / 32 * 32 + k % 8 * 4 + k % 32 / 8; }

void tables(const float* t, int64_t Kpad, float inverse, int16_t* lut, int32_t* factor) {
    for (int64_t k = 0; k < Kpad; k += 16) {
        int shift;
        int16_t q[16];
        store_i16(q, quantize_group(t + k, inverse, &shift));
        *factor++ = 1 << shift;
        *factor++ = 1 << (16 + shift);
        for (int four = 0; four < 16; four += 4, lut += 16) {
            for (int entry = 0; entry < 16; ++entry) {
                int sum = 0;
                for (int j = 0; j < 4; ++j) sum += entry >> j & 1 ? q[four + j] : -q[four + j];
                lut[entry] = int16_t(sum);
            }
        }
    }
}

void gemv(const uint16_t* words, int blocks, int64_t Kpad, const int16_t* lut,
          const int32_t* factor, const uint16_t*, int32_t* total) {
    for (int block = 0; block < blocks; ++block, total += kBlock) {
        int32_t sums[kBlock] = {};
        for (int64_t column = 0; column < Kpad / 16; ++column, words += kBlock) {
            const int16_t* four = lut + column * 64;
            for (int lane = 0; lane < kBlock; ++lane) {
                const unsigned w = words[lane];
                const int sum = four[w & 15] + four[16 + (w >> 4 & 15)] +
                                four[32 + (w >> 8 & 15)] + four[48 + (w >> 12)];
                sums[lane] += sum * factor[2 * column];
            }
        }
        for (int lane = 0; lane < kBlock; ++lane) total[bmos::lane_row(lane)] = sums[lane];
    }
}

void digits(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A, int64_t stride,
            int32_t* sums) {
    for (int p = 0; p < planes; ++p) sums[p] = 0;
    for (int64_t k = 0; k < Kpad; k += 16) {
        int32_t q[16];
        store(q, quantize(t + k, inverse, planes));
        for (int i = 0; i < 16; ++i) {
            const int64_t at = k / 64 * kTile * 64 + place_of(int(k % 64) + i);
            int32_t rest = q[i];
            for (int p = 0; p < planes; ++p) {
                const auto digit = int8_t(uint8_t(rest & 0xff));
                A[p * stride + at] = digit;
                sums[p] += digit;
                rest = (rest - digit) >> 8;
            }
        }
    }
}

void expand(const uint16_t* words, int64_t Kpad, uint8_t* B) {
    for (int64_t k = 0; k < Kpad; k += 16, words += kBlock) {
        uint8_t* panel = B + k / 64 * 2048;
        for (int lane = 0; lane < kBlock; ++lane) {
            const int row = bmos::lane_row(lane);
            for (int i = 0; i < 16; ++i) {
                const int place = place_of(int(k % 64) + i);
                panel[row / 16 * 1024 + place / 4 * 64 + row % 16 * 4 + place % 4] =
                    words[lane] >> i & 1;
            }
        }
    }
}

void gemm(const int8_t* A, int tiles, int rows, int64_t Kpad, const uint8_t* B, int32_t* C) {
    for (int tile = 0; tile < tiles; ++tile, A += Kpad * kTile, C += kTile * kBlock) {
        for (int r = 0; r < rows; ++r) {
            int32_t sums[kBlock] = {};
            for (int64_t k = 0; k < Kpad; k += 4) {
                const int8_t* a = A + k / 64 * 1024 + r * 64 + k % 64;
                const uint8_t* b = B + k / 64 * 2048 + k % 64 * 16;
                for (int n = 0; n < kBlock; ++n) {
                    const uint8_t* four = b + n / 16 * 1024 + n % 16 * 4;
                    sums[n] += a[0] * four[0] + a[1] * four[1] + a[2] * four[2] + a[3] * four[3];
                }
            }
            memcpy(C + r * kBlock, sums, sizeof(sums));
        }
    }
}

}  // namespace

const bmos::Kernels bmos::portable_kernels = {
    "portable", 4,    to_float, dot,     mix,     tables, gemv,
    digits,     expand, gemm,     nothing, nothing, finish,
};
