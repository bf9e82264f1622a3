// Sixteen floats or integers in plain C++, for compilers to vectorize as they can. The vec_*.h
// files have the same functions, and every one of them rounds as these do.

#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

namespace bmos::portable {

struct V {
    float lane[16];
};
struct I {
    int32_t lane[16];
};

template <class To, class From>
inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

template <class R, class F>
inline R each(F f) {
    R r;
    for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
    return r;
}

inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    // Shift into place and correct the exponent's bias by a multiplication, which also
    // normalizes subnormal numbers.
    float x = bit_cast<float>(rest << 13) * bit_cast<float>(0x77800000u);  // 2**112
    if (rest >= 0x7c00) x = bit_cast<float>((rest << 13) | 0x7f800000u);
    return bit_cast<float>(bit_cast<uint32_t>(x) | sign);
}

inline uint16_t f32_to_f16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7fffffff;
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    if (rest > 0x7f800000) return sign | 0x7e00 | uint16_t((rest >> 13) & 0x3ff);
    if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to more than 65504
    if (rest < 0x38800000) {                       // subnormal: let fp32 addition round it
        const float rounded = bit_cast<float>(rest) + 0.5f;
        return sign | uint16_t(bit_cast<uint32_t>(rounded) - 0x3f000000u);
    }
    const uint32_t odd = (rest >> 13) & 1;
    return sign | uint16_t((rest - 0x38000000u + 0xfff + odd) >> 13);
}

inline uint16_t f32_to_bf16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int kSumsInRegisters = 4;  // For processors with as many as AVX2.

inline V set(float x) {
    return each<V>([&](int) { return x; });
}
inline V load(const float* p) {
    return each<V>([&](int i) { return p[i]; });
}
inline V load_f16(const uint16_t* p) {
    return each<V>([&](int i) { return f16_to_f32(p[i]); });
}
inline V load_bf16(const uint16_t* p) {
    return each<V>([&](int i) { return bit_cast<float>(uint32_t(p[i]) << 16); });
}
inline V load_i8(const int8_t* p) {
    return each<V>([&](int i) { return float(p[i]); });
}
inline void store(float* p, V x) { memcpy(p, x.lane, sizeof(x.lane)); }
inline void store_f16(uint16_t* p, V x) {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(x.lane[i]);
}
inline void store_bf16(uint16_t* p, V x) {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_bf16(x.lane[i]);
}
inline V add(V a, V b) {
    return each<V>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline V mul(V a, V b) {
    return each<V>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline V fma(V a, V b, V c) {
    return each<V>([&](int i) { return fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}

inline I load(const int32_t* p) {
    return each<I>([&](int i) { return p[i]; });
}
inline void store(int32_t* p, I x) { memcpy(p, x.lane, sizeof(x.lane)); }
inline void store_i16(int16_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = int16_t(x.lane[i]);
}
inline I set(int32_t x) {
    return each<I>([&](int) { return x; });
}
inline I add(I a, I b) {
    return each<I>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline I sub(I a, I b) {
    return each<I>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline I max(I a, I b) {
    return each<I>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline I shift_left(I a, int bits) {
    return each<I>([&](int i) { return a.lane[i] * (1 << bits); });
}
inline I bits_of_abs(V x) {
    return each<I>([&](int i) { return bit_cast<int32_t>(x.lane[i]) & 0x7fffffff; });
}
// To the nearest, ties to even: next to 2**23 a float has no bits behind the point. Larger ones
// have none to begin with.
inline I round(V x) {
    return each<I>([&](int i) {
        const float v = x.lane[i], large = v < 0.0f ? -8388608.0f : 8388608.0f;
        return int32_t(v > -8388608.0f && v < 8388608.0f ? (v + large) - large : v);
    });
}
inline V to_float(I x) {
    return each<V>([&](int i) { return float(x.lane[i]); });
}

inline int32_t max_of(I x) {
    int32_t y = x.lane[0];
    for (int i = 1; i < 16; ++i) y = x.lane[i] > y ? x.lane[i] : y;
    return y;
}

inline bool any_at_least(I x, int32_t limit) { return max_of(x) >= limit; }

// Lanes i and i + 8, then i and i + 4, then 2, then 1.
inline float sum_of(V x) {
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
    }
    return x.lane[0];
}

}  // namespace bmos::portable
