// AVX-512 with VNNI and VBMI. One function of each kind of kernels.h; see there for the layouts.

#include "vec_avx512.h"

#define BMOS_ISA avx512
#include "rows.h"

namespace bmos::avx512 {

// gcc 12 copies and spills the accumulators of the intrinsics; it leaves these in place.
inline void add_products(I& sum, I words, I factors) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(words), "v"(factors));
}
inline void add_selected(I& sum, I bits, I bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bits), "v"(bytes));
}

// Entry i of a table of q[0..3] is the sum of q[j] with the sign of bit j of i: pairs of signs.
struct Signs {
    int16_t pair[2][32] = {};
    constexpr Signs() {
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 4; ++j) pair[j / 2][2 * i + j % 2] = i >> j & 1 ? 1 : -1;
        }
    }
};
alignas(64) constexpr Signs kSigns;

// The low (then the high) nibble of each byte of a dword has a table of 16 sums; the tables of the
// four bytes are one operand of vpermb. There is one such operand for the lower bytes of the sums
// and one for the upper bytes.
//
//     sums[Kpad/32][nibble][lower, upper][byte of the dword][16]
void tables(const float* t, int64_t Kpad, float inverse, Part, Tables tables,
            const uint32_t* next) {
    const I low = _mm512_load_si512(kSigns.pair[0]), high = _mm512_load_si512(kSigns.pair[1]);
    // Packing leaves four entries of byte 0, 1, 2, 3 in each 128-bit lane.
    const I transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I lower = _mm512_set1_epi16(0xff);
    uint8_t* to = tables.sums;
    for (int64_t k = 0; k < Kpad; k += 32) {
        for (int line = 0; line < kUnit * kBlock / 16; ++line, next += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        }
        alignas(64) int32_t q[16];  // pairs
        for (int group = 0; group < 2; ++group) {
            const V v = mul(load(t + k + 16 * group), set(inverse));
            const int shift = shift_of(v);
            store_i16(reinterpret_cast<int16_t*>(q + 8 * group), round(mul(v, set(kDown[shift]))));
            tables.factor[k / 16 + group] = 1 << shift;
        }
        for (int nibble = 0; nibble < 2; ++nibble, to += 128) {
            I sums[4];
#pragma GCC unroll 4
            for (int byte = 0; byte < 4; ++byte) {
                const int32_t* four = q + 4 * byte + 2 * nibble;
                sums[byte] = _mm512_setzero_si512();
                add_products(sums[byte], low, _mm512_set1_epi32(four[0]));
                add_products(sums[byte], high, _mm512_set1_epi32(four[1]));
            }
            const I s01 = _mm512_packs_epi32(sums[0], sums[1]);
            const I s23 = _mm512_packs_epi32(sums[2], sums[3]);
            const I lowers = _mm512_packus_epi16(_mm512_and_si512(s01, lower),
                                                 _mm512_and_si512(s23, lower));
            const I uppers = _mm512_packs_epi16(_mm512_srai_epi16(s01, 8),
                                                _mm512_srai_epi16(s23, 8));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi32(transpose, lowers));
            _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi32(transpose, uppers));
        }
    }
}

// Columns of 32 weights that are fetched ahead: 2 KB of each block, of which there are four. The
// processor's own prefetcher stops at the end of each block and page.
constexpr int64_t kAhead = 16;

// Z registers of 16 rows of the layer: look up the sums of four weights, a nibble of every byte at
// a time, and add the four of a dword, times their factors. Lower bytes are unsigned and uppers
// signed, as vpdpbusd has them on its two sides.
template <int Z, bool kShared>
void gemv_of(const uint32_t* words, int64_t Kpad, Tables tables, Ahead ahead, int32_t* total) {
    const int64_t block = Kpad;  // dwords
    const I nibble = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
    const uint8_t* sums = tables.sums;
    I lower[Z], upper[Z];
#pragma GCC unroll 8
    for (int z = 0; z < Z; ++z) lower[z] = upper[z] = _mm512_setzero_si512();
    for (int64_t k = 0; k < Kpad / 32; ++k) {
        const I low0 = _mm512_loadu_si512(sums), low1 = _mm512_loadu_si512(sums + 64);
        const I high0 = _mm512_loadu_si512(sums + 128), high1 = _mm512_loadu_si512(sums + 192);
        sums += 256;
        // A byte each for the two groups of 16.
        const I factor = _mm512_set1_epi32(tables.factor[2 * k] * 0x101 +
                                           tables.factor[2 * k + 1] * 0x1010000);
        const uint32_t* soon = k + kAhead < Kpad / 32
                                   ? words + kAhead * kBlock
                                   : ahead.next + (k + kAhead - Kpad / 32) * kBlock;
#pragma GCC unroll 8
        for (int z = 0; z < Z; ++z) {
            const I w = _mm512_loadu_si512(words + z / 2 * block + z % 2 * 16);
            _mm_prefetch(reinterpret_cast<const char*>(soon + z / 2 * block + z % 2 * 16),
                         _MM_HINT_T0);
            if (kShared && z < ahead.lines) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead.part + z * 16), _MM_HINT_T1);
            }
            // (w & nibble) | table
            const I low = _mm512_ternarylogic_epi32(w, nibble, table, 0xea);
            const I high =
                _mm512_ternarylogic_epi32(_mm512_srli_epi32(w, 4), nibble, table, 0xea);
            add_selected(lower[z], _mm512_permutexvar_epi8(low, low0), factor);
            add_selected(upper[z], factor, _mm512_permutexvar_epi8(low, low1));
            add_selected(lower[z], _mm512_permutexvar_epi8(high, high0), factor);
            add_selected(upper[z], factor, _mm512_permutexvar_epi8(high, high1));
        }
        words += kBlock;
        ahead.part += ahead.lines * 16;
    }
#pragma GCC unroll 8
    for (int z = 0; z < Z; ++z) {
        _mm512_storeu_si512(total + z * 16,
                            _mm512_add_epi32(lower[z], _mm512_slli_epi32(upper[z], 8)));
    }
}

template <bool kShared>
void gemv_as(const uint32_t* words, int blocks, int64_t Kpad, Tables tables, Ahead ahead,
             int32_t* total) {
    if (blocks == 4) return gemv_of<8, kShared>(words, Kpad, tables, ahead, total);
    if (blocks == 3) return gemv_of<6, kShared>(words, Kpad, tables, ahead, total);
    if (blocks == 2) return gemv_of<4, kShared>(words, Kpad, tables, ahead, total);
    gemv_of<2, kShared>(words, Kpad, tables, ahead, total);
}

void gemv(const uint32_t* words, int blocks, int64_t Kpad, Tables tables, Ahead ahead,
          int32_t* total) {
    if (ahead.lines) return gemv_as<true>(words, blocks, Kpad, tables, ahead, total);
    gemv_as<false>(words, blocks, Kpad, tables, ahead, total);
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

void expand(const uint32_t* words, int64_t width, uint8_t* B) {
    const I one = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < width; k += 32, words += kBlock) {
        const I left = _mm512_loadu_si512(words), right = _mm512_loadu_si512(words + 16);
        uint8_t* to = B + k / 64 * kPanelBytes + k % 64 * 16;
#pragma GCC unroll 8
        for (int bit = 0; bit < 8; ++bit) {
            _mm512_storeu_si512(to + bit * kRow,
                                _mm512_and_si512(_mm512_srli_epi32(left, bit), one));
            _mm512_storeu_si512(to + kTileBytes + bit * kRow,
                                _mm512_and_si512(_mm512_srli_epi32(right, bit), one));
        }
    }
}

template <int R>
void gemm_rows(const int8_t* A, int64_t width, const uint8_t* B, int32_t* C, bool add) {
    I left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        left[r] = add ? _mm512_loadu_si512(C + r * kBlock) : _mm512_setzero_si512();
        right[r] = add ? _mm512_loadu_si512(C + r * kBlock + 16) : _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < width; k += 64) {
        for (int i = 0; i < 16; ++i) {
            const I b0 = _mm512_loadu_si512(B + i * kRow);
            const I b1 = _mm512_loadu_si512(B + kTileBytes + i * kRow);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, A + r * kRow + 4 * i, sizeof(four));
                const I a = _mm512_set1_epi32(four);
                add_selected(left[r], b0, a);
                add_selected(right[r], b1, a);
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

void gemm(const int8_t* A, int64_t stride, int tiles, int rows, int64_t width, const uint8_t* B,
          int32_t* C, bool add, const uint32_t* next) {
    for (int64_t k = 0; next && k < width; k += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(next + k), _MM_HINT_T1);
    }
    for (int tile = 0; tile < tiles; ++tile) {
        for (int r = 0; r < rows; r += 8) {
            const int8_t* a = A + r * kRow;
            int32_t* c = C + r * kBlock;
            switch (rows - r) {
                case 1: gemm_rows<1>(a, width, B, c, add); break;
                case 2: gemm_rows<2>(a, width, B, c, add); break;
                case 3:
                case 4: gemm_rows<4>(a, width, B, c, add); break;
                default: gemm_rows<8>(a, width, B, c, add);
            }
        }
        A += stride;
        C += 16 * kBlock;
    }
}

}  // namespace bmos::avx512

const bmos::Kernels bmos::avx512_kernels = {
    "avx512",
    {0, 6, INT64_MAX, 0, 0},
    false,
    32,
    avx512::to_float,
    avx512::dot,
    avx512::mix,
    avx512::tables,
    avx512::gemv,
    avx512::digits,
    avx512::expand,
    avx512::gemm,
    avx512::nothing,
    avx512::nothing,
    avx512::finish,
};
