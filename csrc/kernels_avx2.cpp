// AVX2 with FMA and F16C. One function of each kind of kernels.h; see there for the layouts. Those
// that work with tables are in tables_avx2.h.

#include "vec_avx2.h"

#define BMOS_ISA avx2
#include "rows.h"
#include "tables_avx2.h"

namespace bmos::avx2 {

inline __m256i byte_of(__m256i q, int p) {
    return _mm256_and_si256(_mm256_srl_epi32(q, _mm_cvtsi32_si128(8 * p)), _mm256_set1_epi32(255));
}

void digits(const float* t, int64_t Kpad, float inverse, int planes, int8_t* A, int64_t stride,
            int32_t* sums) {
    // Balanced digits: adding 128 to every lower byte carries into the next where the byte is at
    // least 128, and flipping its top bit takes the 128 away again.
    const __m256i carry = _mm256_set1_epi32(planes == 4 ? 0x808080 : planes == 2 ? 0x80 : 0);
    // In each half, the bytes 4 * j + i to 4 * i + j.
    const __m256i transpose = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i plane_sums[4];
    for (int p = 0; p < planes; ++p) plane_sums[p] = _mm256_setzero_si256();
    for (int64_t k = 0; k < Kpad; k += 32) {
        const I low = quantize(t + k, inverse, planes);
        const I high = quantize(t + k + 16, inverse, planes);
        __m256i q[4] = {low.a, low.b, high.a, high.b};
        for (auto& x : q) x = _mm256_xor_si256(_mm256_add_epi32(x, carry), carry);
        for (int p = 0; p < planes; ++p) {
            // Packing works within halves: 0-3 and 4-7 of each of the four.
            const __m256i bytes = _mm256_packus_epi16(
                _mm256_packus_epi32(byte_of(q[0], p), byte_of(q[1], p)),
                _mm256_packus_epi32(byte_of(q[2], p), byte_of(q[3], p)));
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
            plane_sums[p] = _mm256_add_epi32(plane_sums[p], sum_pairs(pairs));
            store256(A + p * stride + k / 64 * kTileBytes + k % 64,
                     _mm256_shuffle_epi8(bytes, transpose));
        }
    }
    for (int p = 0; p < planes; ++p) sums[p] = int32_t(sum_of_lanes(plane_sums[p]));
}

void expand(const uint32_t* words, int64_t width, uint8_t* B) {
    const __m256i one = _mm256_set1_epi8(1);
    for (int64_t k = 0; k < width; k += 32, words += kBlock) {
        uint8_t* panel = B + k / 64 * kPanelBytes + k % 64 * 16;
        // The four bytes of a row come together again, four rows in each half.
        const __m256i b0 = load256(words), b1 = load256(words + 8), b2 = load256(words + 16),
                      b3 = load256(words + 24);
        const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), low23 = _mm256_unpacklo_epi8(b2, b3);
        const __m256i high01 = _mm256_unpackhi_epi8(b0, b1), high23 = _mm256_unpackhi_epi8(b2, b3);
        const __m256i rows[4] = {
            _mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
            _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
        for (int eight = 0; eight < 4; ++eight) {
            const __m256i a = rows[eight % 2 * 2], b = rows[eight % 2 * 2 + 1];
            const __m256i w = eight < 2 ? _mm256_permute2x128_si256(a, b, 0x20)
                                        : _mm256_permute2x128_si256(a, b, 0x31);
            uint8_t* to = panel + eight / 2 * kTileBytes + eight % 2 * 32;
#pragma GCC unroll 8
            for (int bit = 0; bit < 8; ++bit) {
                store256(to + bit * kRow, _mm256_and_si256(_mm256_srli_epi32(w, bit), one));
            }
        }
    }
}

// R tokens by 16 rows of the layer. A pair of products is at most 2 * 128, so 16 bits
// hold 128 pairs.
template <int R>
void gemm_rows(const int8_t* A, int64_t width, const uint8_t* B, int32_t* C, bool add) {
    for (int64_t start = 0; start < width; start += 512) {
        const int64_t end = width - start < 512 ? width : start + 512;
        __m256i left[R], right[R];
        for (int r = 0; r < R; ++r) left[r] = right[r] = _mm256_setzero_si256();
        for (int64_t k = start; k < end; k += 4) {
            const uint8_t* b = B + k / 64 * kPanelBytes + k % 64 * 16;
            const int8_t* a = A + k / 64 * kTileBytes + k % 64;
            const __m256i b0 = load256(b), b1 = load256(b + 32);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, a + r * kRow, sizeof(four));
                const __m256i x = _mm256_set1_epi32(four);
                left[r] = _mm256_add_epi16(left[r], _mm256_maddubs_epi16(b0, x));
                right[r] = _mm256_add_epi16(right[r], _mm256_maddubs_epi16(b1, x));
            }
        }
        for (int r = 0; r < R; ++r) {
            int32_t* c = C + r * kBlock;
            __m256i c0 = sum_pairs(left[r]), c1 = sum_pairs(right[r]);
            if (add || start > 0) {
                c0 = _mm256_add_epi32(c0, load256(c));
                c1 = _mm256_add_epi32(c1, load256(c + 8));
            }
            store256(c, c0);
            store256(c + 8, c1);
        }
    }
}

void gemm(const int8_t* A, int64_t stride, int tiles, int rows, int64_t width, const uint8_t* B,
          int32_t* C, bool add) {
    for (int tile = 0; tile < tiles; ++tile) {
        for (int half = 0; half < 2; ++half) {
            const uint8_t* b = B + half * kTileBytes;
            for (int r = 0; r < rows; r += 4) {
                const int8_t* a = A + r * kRow;
                int32_t* c = C + r * kBlock + half * 16;
                switch (rows - r) {
                    case 1: gemm_rows<1>(a, width, b, c, add); break;
                    case 2: gemm_rows<2>(a, width, b, c, add); break;
                    default: gemm_rows<4>(a, width, b, c, add);
                }
            }
        }
        A += stride;
        C += 16 * kBlock;
    }
}

}  // namespace bmos::avx2

const bmos::Kernels bmos::avx2_kernels = {
    "avx2",
    {0, INT64_MAX, INT64_MAX, 0, 0},
    true,
    avx2::kGroupBytes / 4,
    avx2::to_float,
    avx2::dot,
    avx2::mix,
    avx2::tables,
    avx2::gemv,
    avx2::digits,
    avx2::expand,
    avx2::gemm,
    avx2::nothing,
    avx2::nothing,
    avx2::finish,
};
