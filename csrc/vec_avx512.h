// Sixteen floats or integers in one AVX-512 register. The vec_*.h files have the same functions.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bmos::avx512 {

using V = __m512;
using I = __m512i;

constexpr int kSumsInRegisters = 16;  // Of sixteen lanes, and room for their factors.

inline V set(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline V load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline V load_i8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store_f16(uint16_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, V x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline void store_i16(int16_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline I set(int32_t x) { return _mm512_set1_epi32(x); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I max(I a, I b) { return _mm512_max_epi32(a, b); }
inline I shift_left(I a, int bits) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
inline I bits_of_abs(V x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
inline I round(V x) { return _mm512_cvtps_epi32(x); }
inline V to_float(I x) { return _mm512_cvtepi32_ps(x); }

inline int32_t max_of(I x) {
    const __m256i y =
        _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1));
    return _mm_cvtsi128_si32(z);
}

inline bool any_at_least(I x, int32_t limit) {
    return _mm512_cmpge_epi32_mask(x, _mm512_set1_epi32(limit));
}

// Lanes i and i + 8, then i and i + 4, then 2, then 1.
inline float sum_of(V x) {
    const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x), 1));
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), high);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    z = _mm_add_ss(z, _mm_movehdup_ps(z));
    return _mm_cvtss_f32(z);
}

}  // namespace bmos::avx512
