// AVX2 with FMA and F16C: the functions of kernels.h that a layer with tables needs. There is no
// matrix product, as tables are faster in every mode and for any number of tokens.
//
// vpshufb looks up 32 nibbles in a table of 16 bytes, and only bytes are cheap to add. So an entry
// is the sum of those of four integers whose bits are 1, less the least such sum: 17 bits without a
// sign, in two planes of 6 bits and one of 5, of which four and eight add up within a byte. The sum
// with signs is twice that of the entries less that of the absolute values.
//
//     Tables::sums[Kpad/16][plane][the low nibbles of both bytes, the high ones][16]
//     Tables::factor[0] is the sum of the absolute values; factor[1] is 0 if the last plane is

#include "vec_avx2.h"

#define BMOS_ISA avx2
#include "rows.h"

namespace bmos::avx2 {

inline __m256i sum_pairs(__m256i words) {
    return _mm256_madd_epi16(words, _mm256_set1_epi16(1));
}

inline uint32_t sum_of_lanes(__m256i x) {
    uint32_t lane[8], sum = 0;
    store256(lane, x);
    for (uint32_t one : lane) sum += one;
    return sum;
}

constexpr int kPlaneBytes = 4 * 16, kGroupBytes = 3 * kPlaneBytes;

// The lower (upper) 16 bits of each dword times `low` (`high`), added.
inline __m256i times(__m256i pairs, int low, int high) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi32(high << 16 | low));
}

// The tables of the first or second four in both halves of q, whose negative ones add up to dword
// `kFour` of `least`. The shuffles want constants.
template <int kFour>
inline void tabulate_four(__m256i q, __m256i least, uint8_t* to, __m256i& last) {
    const __m256i six = _mm256_set1_epi32(63);
    const __m256i bits = _mm256_broadcastsi128_si256(_mm_setr_epi16(0, 0, 1, 0, 0, 1, 1, 1));
    const __m256i q01 = _mm256_shuffle_epi32(q, kFour ? 0xaa : 0x00);
    const __m256i q23 = _mm256_shuffle_epi32(q, kFour ? 0xff : 0x55);
    // Entries 0 to 3, 4 to 7, 8 to 11 and 12 to 15 of a table in each half.
    __m256i e[4];
    e[0] = _mm256_sub_epi32(_mm256_madd_epi16(q01, bits),
                            _mm256_shuffle_epi32(least, kFour ? 0x55 : 0x00));
    e[1] = _mm256_add_epi32(e[0], times(q23, 1, 0));
    e[2] = _mm256_add_epi32(e[0], times(q23, 0, 1));
    e[3] = _mm256_add_epi32(e[0], times(q23, 1, 1));
#pragma GCC unroll 3
    for (int plane = 0; plane < 3; ++plane) {
        __m256i digit[4];
        for (int j = 0; j < 4; ++j) {
            digit[j] = plane < 2 ? _mm256_and_si256(e[j], six) : e[j];
            e[j] = _mm256_srli_epi32(e[j], 6);
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(digit[0], digit[1]),
                                                  _mm256_packs_epi32(digit[2], digit[3]));
        store256(to + plane * kPlaneBytes, bytes);
        if (plane == 2) last = _mm256_or_si256(last, bytes);
    }
}

// The tables of a group of sixteen. Adds its absolute values to `sizes`, and the bits of its last
// plane to `last`.
inline void tabulate(__m256i q, uint8_t* to, __m256i& sizes, __m256i& last) {
    const __m256i zero = _mm256_setzero_si256();
    sizes = _mm256_add_epi32(sizes, sum_pairs(_mm256_abs_epi16(q)));
    // Each half has two times four, whose negative ones add up to dwords 0 and 1 of this.
    const __m256i least = _mm256_hadd_epi32(sum_pairs(_mm256_min_epi16(q, zero)), zero);
    tabulate_four<0>(q, least, to, last);
    tabulate_four<1>(q, least, to + 32, last);
}

// Sixteen integers of 16 bits.
inline I part_of(const float* t, float inverse, Part part) {
    if (part == Part::whole) return quantize(t, inverse, BMOS_DEFAULT);
    const I q = quantize(t, inverse, BMOS_EXACT);
    constexpr int32_t half = 1 << (kPartBits - 1);
    const I upper = {_mm256_srai_epi32(_mm256_add_epi32(q.a, _mm256_set1_epi32(half)), kPartBits),
                     _mm256_srai_epi32(_mm256_add_epi32(q.b, _mm256_set1_epi32(half)), kPartBits)};
    return part == Part::upper ? upper : sub(q, shift_left(upper, kPartBits));
}

void tables(const float* t, int64_t Kpad, float inverse, Part part, Tables tables,
            const uint32_t* next) {
    __m256i sizes = _mm256_setzero_si256(), last = sizes;
    uint8_t* to = tables.sums;
    for (int64_t k = 0; k < Kpad; k += kPad) {
        // The integers are long in coming: four groups at a time.
        alignas(32) int16_t q[4][16];
#pragma GCC unroll 4
        for (int group = 0; group < 4; ++group) {
            store_i16(q[group], part_of(t + k + 16 * group, inverse, part));
        }
        for (int line = 0; line < kUnit * kPad * kBlock / 512; ++line, next += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        }
        for (int group = 0; group < 4; ++group, to += kGroupBytes) {
            tabulate(load256(q[group]), to, sizes, last);
        }
    }
    tables.factor[0] = int32_t(sum_of_lanes(sizes));
    tables.factor[1] = !_mm256_testz_si256(last, last);
}

// Sums of bytes of 32 rows: of each pair of rows as 16 bits, and of its second row alone.
struct ByteSums {
    __m256i both = _mm256_setzero_si256(), second = _mm256_setzero_si256();

    void add(__m256i bytes) {
        both = _mm256_add_epi16(both, bytes);
        second = _mm256_add_epi16(second, _mm256_srli_epi16(bytes, 8));
        asm("" : "+x"(both), "+x"(second));  // here and not later: gcc 12 would spill the bytes
    }
    // Each row times 1 << shift, to 32 bits.
    void add_to(uint32_t* total, int shift) const {
        const __m256i first = _mm256_sub_epi16(both, _mm256_slli_epi16(second, 8));
        const __m256i zero = _mm256_setzero_si256();
        const __m128i count = _mm_cvtsi32_si128(shift);
        const __m256i low = _mm256_unpacklo_epi16(first, second);
        const __m256i high = _mm256_unpackhi_epi16(first, second);
        const __m256i four[4] = {
            _mm256_unpacklo_epi16(low, zero), _mm256_unpackhi_epi16(low, zero),
            _mm256_unpacklo_epi16(high, zero), _mm256_unpackhi_epi16(high, zero)};
        // Row 4 * i + j lies in the lower half of four[i], row 16 + 4 * i + j in the upper one.
        for (int i = 0; i < 4; ++i) {
            const __m256i x = four[i];
            for (int half = 0; half < 2; ++half) {
                uint32_t* to = total + 16 * half + 4 * i;
                const __m128i part =
                    half ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                                 _mm_add_epi32(load128(to), _mm_sll_epi32(part, count)));
            }
        }
    }
};

// Weights whose sums 16 bits hold: four entries of 63 for each 16, or eight of 31 for each 32.
constexpr int64_t kSpan = 2048;
static_assert(kSpan / 16 * (4 * 63) < 65536 && kSpan / 32 * (8 * 31) < 65536);

// Weights that are fetched ahead, 2 KB: the processor's own prefetcher stops at each page's end.
constexpr int64_t kAhead = 512;

// total[32] += the entries of `width` weights of the 32 rows of a block, in the first kPlanes
// planes (int8 mode has nothing in the last). The weights that are looked up next lie at `next`.
template <int kPlanes>
void look_up(const uint8_t* bytes, int64_t width, const uint8_t* tables, const uint8_t* next,
             uint32_t* total) {
    const __m256i nibble = _mm256_set1_epi8(15);
    ByteSums lower, middle, upper;
    for (int64_t k = 0; k < width; k += 32) {
        const int64_t left = width - k - kAhead;
        const uint8_t* ahead = left > 0 ? bytes + 4 * kAhead : next - 4 * left;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(ahead + 64), _MM_HINT_T0);
        __m256i fives = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int group = 0; group < 2; ++group, tables += kGroupBytes, bytes += 64) {
            const __m256i w0 = load256(bytes), w1 = load256(bytes + 32);
            const __m256i index[4] = {
                _mm256_and_si256(w0, nibble), _mm256_and_si256(w1, nibble),
                _mm256_and_si256(_mm256_srli_epi16(w0, 4), nibble),
                _mm256_and_si256(_mm256_srli_epi16(w1, 4), nibble)};
            __m256i sums[3] = {};
#pragma GCC unroll 3
            for (int plane = 0; plane < kPlanes; ++plane) {
                __m256i found[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const __m128i table = load128(tables + plane * kPlaneBytes + 16 * i);
                    found[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index[i]);
                }
                sums[plane] = _mm256_add_epi8(_mm256_add_epi8(found[0], found[1]),
                                              _mm256_add_epi8(found[2], found[3]));
            }
            lower.add(sums[0]);
            middle.add(sums[1]);
            if (kPlanes == 3) fives = _mm256_add_epi8(fives, sums[2]);
        }
        if (kPlanes == 3) upper.add(fives);
    }
    lower.add_to(total, 0);
    middle.add_to(total, 6);
    if (kPlanes == 3) upper.add_to(total, 12);
}

void gemv(const uint32_t* words, int blocks, int64_t Kpad, Tables tables, Ahead ahead,
          int32_t* total) {
    uint32_t sums[kUnit * kBlock] = {};
    const auto bytes_at = [&](int block, int64_t k) {
        return reinterpret_cast<const uint8_t*>(words + block * Kpad + k);
    };
    for (int64_t k = 0; k < Kpad; k += kSpan) {
        const int64_t width = Kpad - k < kSpan ? Kpad - k : kSpan;
        for (int block = 0; block < blocks; ++block) {
            const uint8_t* then = block + 1 < blocks ? bytes_at(block + 1, k)
                                  : k + width < Kpad ? bytes_at(0, k + width)
                                                     : reinterpret_cast<const uint8_t*>(ahead.next);
            const auto add = tables.factor[1] ? look_up<3> : look_up<2>;
            add(bytes_at(block, k), width, tables.sums + k / 16 * kGroupBytes, then,
                sums + block * kBlock);
        }
    }
    const __m256i sizes = _mm256_set1_epi32(tables.factor[0]);
    for (int row = 0; row < blocks * kBlock; row += 8) {
        const __m256i sum = load256(sums + row);
        store256(total + row, _mm256_sub_epi32(_mm256_add_epi32(sum, sum), sizes));
    }
}

}  // namespace bmos::avx2

const bmos::Kernels bmos::avx2_kernels = {
    "avx2",
    {0, INT64_MAX, INT64_MAX, 0, INT64_MAX},
    true,
    avx2::kGroupBytes / 4,
    avx2::to_float,
    avx2::dot,
    avx2::mix,
    avx2::tables,
    avx2::gemv,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    avx2::finish,
};
