// The functions of kernels.h that work along one row and do not see the weights, in terms of the
// sixteen lanes of a vec_*.h file, which is included before this one. BMOS_ISA is the namespace of
// the instruction set: the linker must never take one's function for another's.

#pragma once

#include <string.h>

#include "kernels.h"

namespace bmos::BMOS_ISA {

struct F32 {
    using type = float;
    static V get(const float* p) { return load(p); }
};
struct F16 {
    using type = uint16_t;
    static V get(const uint16_t* p) { return load_f16(p); }
};
struct BF16 {
    using type = uint16_t;
    static V get(const uint16_t* p) { return load_bf16(p); }
};

struct I8 {
    using type = int8_t;
    static V get(const int8_t* p) { return load_i8(p); }
};

// Sixteen numbers, of which only n may be read; the others are zero.
template <class D>
inline V get(const typename D::type* p, int64_t n) {
    if (n >= 16) return D::get(p);
    typename D::type some[16] = {};
    if (n > 0) memcpy(some, p, n * sizeof(some[0]));
    return D::get(some);
}

#define BMOS_BY_DTYPE(dtype, function, ...)                        \
    ((dtype) == BMOS_F32   ? function<F32>(__VA_ARGS__)            \
     : (dtype) == BMOS_F16 ? function<F16>(__VA_ARGS__)            \
                           : function<BF16>(__VA_ARGS__))

template <class D>
void to_float_as(const void* from, int n, int padded, float* out) {
    const auto* p = static_cast<const typename D::type*>(from);
    for (int i = 0; i < padded; i += 16) store(out + i, get<D>(p + (i < n ? i : 0), n - i));
}

void to_float(const void* x, int dtype, int n, int padded, float* out) {
    BMOS_BY_DTYPE(dtype, to_float_as, x, n, padded, out);
}

// Sums of sixteen lanes that one token's part of a dot product is made of, so that additions need
// not wait for each other. A processor with few registers goes through the numbers several times.
constexpr int kSums = 4;

template <class D, int T>
void dot_of(const float* x, int64_t ldx, const typename D::type* r, int n, float* out) {
    constexpr int kStep = kSumsInRegisters / T > 0 ? kSumsInRegisters / T : 1;
    constexpr int kAtOnce = kStep < kSums ? kStep : kSums;
    constexpr int kWidth = 16 * kSums;
    V all[kSums * T];
#pragma GCC unroll 4
    for (int first = 0; first < kSums; first += kAtOnce) {
        V sums[kAtOnce * T];
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce * T; ++j) sums[j] = set(0.0f);
        int i = 16 * first;
        for (; i + kWidth <= n + 16 * first; i += kWidth) {
#pragma GCC unroll 4
            for (int j = 0; j < kAtOnce; ++j) {
                const V y = D::get(r + i + 16 * j);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    sums[j * T + t] = fma(load(x + t * ldx + i + 16 * j), y, sums[j * T + t]);
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j, i += 16) {
            if (i >= n) break;
            const V y = get<D>(r + i, n - i);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                sums[j * T + t] = fma(load(x + t * ldx + i), y, sums[j * T + t]);
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce * T; ++j) all[first * T + j] = sums[j];
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        out[t] = sum_of(add(add(all[t], all[T + t]), add(all[2 * T + t], all[3 * T + t])));
    }
}

template <class D>
void dot_as(const float* x, int64_t ldx, int T, const void* r, int n, float* out) {
    const auto* row = static_cast<const typename D::type*>(r);
    if (T == kTokens) return dot_of<D, kTokens>(x, ldx, row, n, out);
    for (int t = 0; t < T; ++t) dot_of<D, 1>(x + t * ldx, ldx, row, n, out + t);
}

void dot(const float* x, int64_t ldx, int T, const void* r, int dtype, int n, float* out) {
    if (dtype == BMOS_I8) return dot_as<I8>(x, ldx, T, r, n, out);
    BMOS_BY_DTYPE(dtype, dot_as, x, ldx, T, r, n, out);
}

// Sixteen columns from i on, of which n - i are read.
template <class D, int T, bool kWhole>
inline void mix_columns(const float* x, int64_t ldx, const typename D::type* s_in, int64_t lds,
                        int64_t E, const float* G, int i, int n, float* out, I* most) {
    V scale[T];
    const V first = kWhole ? D::get(s_in + i) : get<D>(s_in + i, n - i);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) scale[t] = mul(set(G[t * E]), first);
    for (int64_t e = 1; e < E; ++e) {
        const auto* row = s_in + e * lds + i;
        const V next = kWhole ? D::get(row) : get<D>(row, n - i);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) scale[t] = fma(set(G[t * E + e]), next, scale[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        const V product = mul(load(x + t * ldx + i), scale[t]);
        store(out + t * ldx + i, product);
        most[t] = max(most[t], bits_of_abs(product));
    }
}

template <class D, int T>
void mix_of(const float* x, int64_t ldx, const typename D::type* s_in, int64_t lds, int64_t E,
            const float* G, int n, int padded, float* out, int32_t* max_bits) {
    I most[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) most[t] = set(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        mix_columns<D, T, true>(x, ldx, s_in, lds, E, G, i, n, out, most);
    }
    if (i < n) mix_columns<D, T, false>(x, ldx, s_in, lds, E, G, i, n, out, most);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        for (int j = (n + 15) / 16 * 16; j < padded; j += 16) store(out + t * ldx + j, set(0.0f));
        const int32_t bits = max_of(most[t]);
        if (bits > max_bits[t]) max_bits[t] = bits;
    }
}

template <class D>
void mix_as(const float* x, int64_t ldx, int T, const void* s_in, int64_t lds, int64_t E,
            const float* G, int n, int padded, float* out, int32_t* max_bits) {
    const auto* s = static_cast<const typename D::type*>(s_in);
    if (T == kTokens) return mix_of<D, kTokens>(x, ldx, s, lds, E, G, n, padded, out, max_bits);
    for (int t = 0; t < T; ++t) {
        mix_of<D, 1>(x + t * ldx, ldx, s, lds, E, G + t * E, n, padded, out + t * ldx,
                     max_bits + t);
    }
}

void mix(const float* x, int64_t ldx, int T, const void* s_in, int64_t lds, int dtype, int64_t E,
         const float* G, int n, int padded, float* out, int32_t* max_bits) {
    BMOS_BY_DTYPE(dtype, mix_as, x, ldx, T, s_in, lds, E, G, n, padded, out, max_bits);
}

// A group of 16 activations v becomes round(v * kDown[shift]) << shift, at most kMantissa.
inline int shift_of(V v) {
    // The bits of the least floats that round to more than kMantissa, and to more than its double.
    static_assert(kMantissa == 8191, "8191.5 and 16383");
    const I bits = bits_of_abs(v);
    return any_at_least(bits, 0x45fffc00) + any_at_least(bits, 0x467ffc00);
}
constexpr float kDown[] = {1.0f, 0.5f, 0.25f};

// The sixteen integers that the digits of one mode stand for.
inline I quantize(const float* t, float inverse, int planes) {
    const V v = mul(load(t), set(inverse));
    if (planes != BMOS_DEFAULT) return round(v);
    const int shift = shift_of(v);
    return shift_left(round(mul(v, set(kDown[shift]))), shift);
}

// Sixteen totals from C on.
inline V total_of(const int32_t* C, const int32_t* sums, const Totals& all) {
    if (all.planes == 0) return to_float(load(C));
    if (all.planes == 1 || all.planes == 2) {
        I total = sub(shift_left(load(C), 1), set(sums[0]));
        if (all.planes == 2) {
            const I high = sub(shift_left(load(C + all.plane_stride), 1), set(sums[1]));
            total = add(total, shift_left(high, 8));
        }
        return to_float(total);
    }
    float total[16];
    for (int i = 0; i < 16; ++i) {
        int64_t sum = 0;
        if (all.planes == kTwoParts) {
            sum = int64_t(C[all.plane_stride + i]) * (int64_t(1) << kPartBits) + C[i];
        }
        for (int p = all.planes - 1; p >= 0; --p) {
            sum = sum * 256 + 2 * int64_t(C[p * all.plane_stride + i]) - sums[p];
        }
        total[i] = float(sum);
    }
    return load(total);
}

// Sixteen outputs from i on, of which n - i are wanted, of T tokens. The scales of kE experts stay
// in registers; kE = 0 is any number of experts.
template <int kE>
void finish_columns(const Totals& totals, const OutScales& scales, int T, int i, int n, char* y,
                    int64_t ldy, int dtype) {
    const auto s_out = [&](int64_t e) { return load(scales.s_out + e * scales.lds + i); };
    V kept[kE ? kE : 1];
#pragma GCC unroll 4
    for (int e = 0; e < kE; ++e) kept[e] = s_out(e);
    const int size = dtype == BMOS_F32 ? 4 : 2;
    for (int t = 0; t < T; ++t) {
        const float* G = scales.G + t * scales.E;
        V scale = mul(set(G[0]), kE ? kept[0] : s_out(0));
#pragma GCC unroll 4
        for (int e = 1; e < kE; ++e) scale = fma(set(G[e]), kept[e], scale);
        for (int64_t e = 1; kE == 0 && e < scales.E; ++e) scale = fma(set(G[e]), s_out(e), scale);
        const int32_t* sums = totals.planes > 0 ? totals.sums + t * totals.planes : nullptr;
        const V total = total_of(totals.C + t * kBlock + i, sums, totals);
        V out = mul(mul(total, set(scales.unit[t])), scale);
        if (scales.bias) out = add(out, load(scales.bias + i));
        char* to = y + t * ldy + i * size;
        alignas(64) char some[64];
        char* whole = n - i >= 16 ? to : some;
        if (dtype == BMOS_F32) store(reinterpret_cast<float*>(whole), out);
        if (dtype == BMOS_F16) store_f16(reinterpret_cast<uint16_t*>(whole), out);
        if (dtype == BMOS_BF16) store_bf16(reinterpret_cast<uint16_t*>(whole), out);
        if (whole == some) memcpy(to, some, (n - i) * size);
    }
}

void finish(Totals totals, OutScales scales, int T, int n, void* y, int64_t ldy, int dtype) {
    const auto columns = scales.E == 4   ? finish_columns<4>
                         : scales.E == 1 ? finish_columns<1>
                                         : finish_columns<0>;
    for (int i = 0; i < n; i += 16) {
        columns(totals, scales, T, i, n, static_cast<char*>(y), ldy, dtype);
    }
}

void nothing(void*) {}

}  // namespace bmos::BMOS_ISA
