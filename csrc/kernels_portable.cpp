// Plain C++ for any processor. One function of each kind of kernels.h; see there for the layouts.

#include "vec_portable.h"

#define BMOS_ISA portable
#include "rows.h"

namespace bmos::portable {

// The byte of weight k of 64 in a row of A.
inline int place_of(int k) { return k / 32 * 32 + k % 8 * 4 + k % 32 / 8; }

// int16 sums[Kpad/4][16]
void tables(const float* t, int64_t Kpad, float inverse, Part, Tables tables, const uint32_t*) {
    auto* sums = reinterpret_cast<int16_t*>(tables.sums);
    for (int64_t k = 0; k < Kpad; k += 16) {
        const V v = mul(load(t + k), set(inverse));
        const int shift = shift_of(v);
        int16_t q[16];
        store_i16(q, round(mul(v, set(kDown[shift]))));
        tables.factor[k / 16] = 1 << shift;
        for (int four = 0; four < 16; four += 4, sums += 16) {
            for (int entry = 0; entry < 16; ++entry) {
                int sum = 0;
                for (int j = 0; j < 4; ++j) sum += entry >> j & 1 ? q[four + j] : -q[four + j];
                sums[entry] = int16_t(sum);
            }
        }
    }
}

void gemv(const uint32_t* words, int blocks, int64_t Kpad, Tables tables, Ahead,
          int32_t* total) {
    for (int block = 0; block < blocks; ++block, total += kBlock) {
        for (int row = 0; row < kBlock; ++row) total[row] = 0;
        const auto* sums = reinterpret_cast<const int16_t*>(tables.sums);
        for (int64_t group = 0; group < Kpad / 16; group += 2, words += kBlock, sums += 128) {
            for (int row = 0; row < kBlock; ++row) {
                const uint32_t w = words[row];
                int first = 0, second = 0;
                for (int i = 0; i < 4; ++i) {
                    first += sums[16 * i + (w >> 4 * i & 15)];
                    second += sums[64 + 16 * i + (w >> (16 + 4 * i) & 15)];
                }
                total[row] += first * tables.factor[group] + second * tables.factor[group + 1];
            }
        }
    }
}

void digits(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A, int64_t stride,
            int32_t* sums) {
    for (int p = 0; p < planes; ++p) sums[p] = 0;
    for (int64_t k = 0; k < Kpad; k += 16) {
        int32_t q[16];
        store(q, quantize(t + k, inverse, planes));
        for (int i = 0; i < 16; ++i) {
            const int64_t at = k / 64 * kTileBytes + place_of(int(k % 64) + i);
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

void expand(const uint32_t* words, int64_t width, uint8_t* B) {
    for (int64_t k = 0; k < width; k += 32, words += kBlock) {
        uint8_t* panel = B + k / 64 * kPanelBytes + k % 64 * 16;
        for (int i = 0; i < 8; ++i) {
            for (int row = 0; row < kBlock; ++row) {
                const uint32_t four = words[row] >> i & 0x01010101;
                memcpy(panel + i * kRow + row / 16 * kTileBytes + row % 16 * 4, &four, 4);
            }
        }
    }
}

void gemm(const int8_t* A, int64_t stride, int tiles, int rows, int64_t width, const uint8_t* B,
          int32_t* C, bool add, const uint32_t*) {
    for (int tile = 0; tile < tiles; ++tile, A += stride) {
        for (int r = 0; r < kTile; ++r, C += kBlock) {
            if (r >= rows) continue;
            int32_t sums[kBlock] = {};
            for (int64_t k = 0; k < width; k += 4) {
                const int8_t* a = A + k / 64 * kTileBytes + r * kRow + k % 64;
                const uint8_t* b = B + k / 64 * kPanelBytes + k % 64 * 16;
                for (int n = 0; n < kBlock; ++n) {
                    const uint8_t* four = b + n / 16 * kTileBytes + n % 16 * 4;
                    sums[n] += a[0] * four[0] + a[1] * four[1] + a[2] * four[2] + a[3] * four[3];
                }
            }
            for (int n = 0; n < kBlock; ++n) C[n] = add ? C[n] + sums[n] : sums[n];
        }
    }
}

}  // namespace bmos::portable

const bmos::Kernels bmos::portable_kernels = {
    "portable",
    {0, INT64_MAX, INT64_MAX, 0, 0},
    false,
    32,
    portable::to_float,
    portable::dot,
    portable::mix,
    portable::tables,
    portable::gemv,
    portable::digits,
    portable::expand,
    portable::gemm,
    portable::nothing,
    portable::nothing,
    portable::finish,
};
