// AVX-512 with VNNI. One function of each kind of kernels.h; see there for the layouts.

#include "vec_avx512.h"

#include "rows.h"

namespace {

using bmos::kBlock;

constexpr int kRow = 64;                 // bytes of a row of a tile
constexpr int kTileBytes = 16 * kRow;    // 16 rows
constexpr int kPanelBytes = 2 * kTileBytes;  // B of 64 weights and 32 rows

// Entry i of a table of q[0..3] is the sum of q[j] with the sign of bit j of i: pairs of signs for
// vpdpwssd, in the order of lanes that packs_epi32 puts right.
struct Signs {
    int16_t pair[2][32] = {};
    constexpr Signs() {
        for (int lane = 0; lane < 16; ++lane) {
            const int entry = lane % 4 + lane % 8 / 4 * 8 + lane / 8 * 4;
            for (int j = 0; j < 4; ++j) pair[j / 2][2 * lane + j % 2] = entry >> j & 1 ? 1 : -1;
        }
    }
};
alignas(64) constexpr Signs kSigns;

void tables(const float* t, int64_t Kpad, float inverse, int16_t* lut, int32_t* factor) {
    const I low = _mm512_load_si512(kSigns.pair[0]), high = _mm512_load_si512(kSigns.pair[1]);
    for (int64_t k = 0; k < Kpad; k += 16) {
        int shift;
        alignas(32) int16_t q[16];
        store_i16(q, quantize_group(t + k, inverse, &shift));
        *factor++ = 1 << shift;
        *factor++ = 1 << (16 + shift);
        for (int four = 0; four < 4; ++four, lut += 16) {
            int32_t pair[2];
            memcpy(pair, q + 4 * four, sizeof(pair));
            I sum = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, _mm512_set1_epi32(pair[0]));
            sum = _mm512_dpwssd_epi32(sum, high, _mm512_set1_epi32(pair[1]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(lut),
                                _mm256_packs_epi32(_mm512_castsi512_si256(sum),
                                                   _mm512_extracti64x4_epi64(sum, 1)));
        }
    }
}

inline I table(const int16_t* lut) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lut)));
}

// vpermw reads five bits of every word, and the upper half of each table repeats the lower: no
// mask is needed. A word's sum of 16 fits 16 bits; two vpdpwssd widen it, even and odd lanes.
template <int R>
void gemv_of(const uint16_t* words, int64_t Kpad, const int16_t* lut, const int32_t* factor,
             const uint16_t* next, int32_t* total) {
    const int64_t stride = Kpad / 16 * kBlock;
    I even[R], odd[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < Kpad / 16; ++k) {
        const I t0 = table(lut), t1 = table(lut + 16), t2 = table(lut + 32), t3 = table(lut + 48);
        const I in_low = _mm512_set1_epi32(factor[0]), in_high = _mm512_set1_epi32(factor[1]);
        lut += 64;
        factor += 2;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const I w = _mm512_loadu_si512(words + r * stride);
            if (next) _mm_prefetch(reinterpret_cast<const char*>(next + r * kBlock), _MM_HINT_T1);
            const I s01 = _mm512_add_epi16(
                _mm512_permutexvar_epi16(w, t0),
                _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), t1));
            const I s23 = _mm512_add_epi16(
                _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), t2),
                _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), t3));
            const I s = _mm512_add_epi16(s01, s23);
            even[r] = _mm512_dpwssd_epi32(even[r], s, in_low);
            odd[r] = _mm512_dpwssd_epi32(odd[r], s, in_high);
        }
        words += kBlock;
        if (next) next += R * kBlock;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_si512(total + r * kBlock, _mm512_unpacklo_epi32(even[r], odd[r]));
        _mm512_storeu_si512(total + r * kBlock + 16, _mm512_unpackhi_epi32(even[r], odd[r]));
    }
}

void gemv(const uint16_t* words, int blocks, int64_t Kpad, const int16_t* lut,
          const int32_t* factor, const uint16_t* next, int32_t* total) {
    if (blocks == 4) return gemv_of<4>(words, Kpad, lut, factor, next, total);
    if (blocks == 3) return gemv_of<3>(words, Kpad, lut, factor, next, total);
    if (blocks == 2) return gemv_of<2>(words, Kpad, lut, factor, next, total);
    gemv_of<1>(words, Kpad, lut, factor, next, total);
}

// Byte p of the sixteen integers, as sixteen bytes.
inline __m128i plane_of(I q, int p) {
    return _mm512_cvtepi32_epi8(_mm512_srl_epi32(q, _mm_cvtsi32_si128(8 * p)));
}

void digits(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A, int64_t stride,
            int32_t* sums) {
    // Balanced digits: adding 128 to every lower byte carries into the next where the byte is at
    // least 128, and flipping its top bit takes the 128 away again.
    const I carry = _mm512_set1_epi32(planes == 4 ? 0x808080 : planes == 2 ? 0x80 : 0);
    // 32 bytes 8 * j + i to 4 * i + j: j = 0, 1 lie in the lower lane and 2, 3 in the upper one.
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    const __m256i zip =
        _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    __m256i plane_sums[4];
    for (int p = 0; p < planes; ++p) plane_sums[p] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t k = 0; k < Kpad; k += 32) {
        I low = quantize(t + k, inverse, planes), high = quantize(t + k + 16, inverse, planes);
        low = _mm512_xor_si512(_mm512_add_epi32(low, carry), carry);
        high = _mm512_xor_si512(_mm512_add_epi32(high, carry), carry);
        int8_t* to = A + k / 64 * kTileBytes + k % 64;
        for (int p = 0; p < planes; ++p) {
            const __m256i bytes = _mm256_set_m128i(plane_of(high, p), plane_of(low, p));
            plane_sums[p] = _mm256_dpbusd_epi32(plane_sums[p], ones, bytes);
            _mm256_storeu_si256(
                reinterpret_cast<__m256i*>(to + p * stride),
                _mm256_permutexvar_epi16(zip, _mm256_shuffle_epi8(bytes, pairs)));
        }
    }
    for (int p = 0; p < planes; ++p) {
        sums[p] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(plane_sums[p]));
    }
}

void expand(const uint16_t* words, int64_t Kpad, uint8_t* B) {
    const I one = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < Kpad; k += 32) {
        const I even = _mm512_loadu_si512(words), odd = _mm512_loadu_si512(words + kBlock);
        words += 2 * kBlock;
        I low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
        uint8_t* to = B + k / 64 * kPanelBytes + k % 64 * 16;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int bit = i;
            _mm512_storeu_si512(to + i * kRow,
                                _mm512_and_si512(_mm512_srli_epi32(low, bit), one));
            _mm512_storeu_si512(to + kTileBytes + i * kRow,
                                _mm512_and_si512(_mm512_srli_epi32(high, bit), one));
        }
    }
}

// gcc 12 spills the accumulators of _mm512_dpbusd_epi32; it does not spill these.
inline void accumulate(I& sum, I bits, I bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bits), "v"(bytes));
}

template <int R>
void gemm_rows(const int8_t* A, int64_t Kpad, const uint8_t* B, int32_t* C) {
    I left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = right[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < Kpad; k += 64) {
        for (int i = 0; i < 16; ++i) {
            const I b0 = _mm512_loadu_si512(B + i * kRow);
            const I b1 = _mm512_loadu_si512(B + kTileBytes + i * kRow);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, A + r * kRow + 4 * i, sizeof(four));
                const I a = _mm512_set1_epi32(four);
                accumulate(left[r], b0, a);
                accumulate(right[r], b1, a);
            }
        }
        A += kTileBytes;
        B += kPanelBytes;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_si512(C + r * kBlock, left[r]);
        _mm512_storeu_si512(C + r * kBlock + 16, right[r]);
    }
}

void gemm(const int8_t* A, int tiles, int rows, int64_t Kpad, const uint8_t* B, int32_t* C) {
    for (int tile = 0; tile < tiles; ++tile) {
        for (int r = 0; r < rows; r += 8) {
            const int8_t* a = A + r * kRow;
            int32_t* c = C + r * kBlock;
            switch (rows - r) {
                case 1: gemm_rows<1>(a, Kpad, B, c); break;
                case 2: gemm_rows<2>(a, Kpad, B, c); break;
                case 3:
                case 4: gemm_rows<4>(a, Kpad, B, c); break;
                default: gemm_rows<8>(a, Kpad, B, c);
            }
        }
        A += Kpad * 16;
        C += 16 * kBlock;
    }
}

}  // namespace

const bmos::Kernels bmos::avx512_kernels = {
    "avx512", 4,   to_float, dot,  mix,     tables, gemv,
    digits,   expand, gemm,     nothing, nothing, finish,
};
