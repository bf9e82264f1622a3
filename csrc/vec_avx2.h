// Sixteen floats or integers in two AVX2 registers. The vec_*.h files have the same functions.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bmos::avx2 {

struct V {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

constexpr int kSumsInRegisters = 4;  // Of sixteen lanes, and room for their factors.

inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
inline V load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16))};
}
inline __m256 load_eight(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline V load_i8(const int8_t* p) { return {load_eight(p), load_eight(p + 8)}; }
inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline void store_f16(uint16_t* p, V x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, nearest));
}
// The upper halves of the rounded floats, in the low halves of the lanes.
inline __m256i round_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const __m256 unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(up), nan, unordered);
    return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
inline void store_bf16(uint16_t* p, V x) {
    const __m256i mixed = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
    store256(p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

inline I load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
inline void store(int32_t* p, I x) {
    store256(p, x.a);
    store256(p + 8, x.b);
}
inline void store_i16(int16_t* p, I x) {
    store256(p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
inline I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I abs(I x) { return {_mm256_abs_epi32(x.a), _mm256_abs_epi32(x.b)}; }
inline I shift_left(I x, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_sll_epi32(x.a, count), _mm256_sll_epi32(x.b, count)};
}
inline I bits_of_abs(V x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(x.a), mask),
            _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
inline I round(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline int32_t max_of(I x) {
    const __m256i y = _mm256_max_epi32(x.a, x.b);
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1));
    return _mm_cvtsi128_si32(z);
}

inline bool any_at_least(I x, int32_t limit) {
    const __m256i below = _mm256_set1_epi32(limit - 1);
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(_mm256_max_epi32(x.a, x.b), below));
}

// Lanes i and i + 8, then i and i + 4, then 2, then 1.
inline float sum_of(V x) {
    const __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    z = _mm_add_ss(z, _mm_movehdup_ps(z));
    return _mm_cvtss_f32(z);
}

}  // namespace bmos::avx2
