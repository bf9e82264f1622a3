#include "call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace bmos {

int64_t bytes_of(int dtype) { return dtype == BMOS_F32 ? 4 : dtype == BMOS_I8 ? 1 : 2; }
int64_t chunks_of(int64_t K) { return (K + kChunk - 1) / kChunk; }
int chunk_size(int64_t K, int64_t chunk) {
    return int(std::min<int64_t>(kChunk, K - chunk * kChunk));
}
int chunk_padded(int64_t K, int64_t chunk) {
    return (chunk_size(K, chunk) + kPad - 1) / kPad * kPad;
}

Call Call::some_tokens(int64_t first, int64_t count) const {
    Call some = *this;
    some.x = x_at(first, 0);
    some.y = y_at(first, 0);
    if (logits) some.logits = logits + first * h.S * h.E;
    some.M = count;
    return some;
}
const char* Call::x_at(int64_t m, int64_t k) const { return x + (m * h.K + k) * bytes_of(x_dtype); }
char* Call::y_at(int64_t m, int64_t n) const { return y + (m * N + n) * bytes_of(x_dtype); }
const char* Call::scale_at(const char* scales, int64_t index) const {
    return scales + index * bytes_of(h.scale_dtype);
}

void softmax(const float* logits, int64_t chunks, int64_t stride, int64_t E, float* G) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (int64_t e = 0; e < E; ++e) {
        G[e] = logits[e];
        for (int64_t c = 1; c < chunks; ++c) G[e] += logits[c * stride + e];
        most = std::max(most, G[e]);
    }
    for (int64_t e = 0; e < E; ++e) {
        G[e] = std::exp(G[e] - most);
        sum += G[e];
    }
    for (int64_t e = 0; e < E; ++e) G[e] /= sum;
}

Grid::Grid(int32_t max_bits, int planes) {
    float most;
    std::memcpy(&most, &max_bits, sizeof(most));
    most = std::max(most, 0x1p-90f);  // keeps the inverse finite
    unit = max_bits < 0x7f800000 ? most / mode_limit(planes) : NAN;
    inverse = mode_limit(planes) / most;
}

namespace {

constexpr int kWidth = kUnit * kBlock;

int unit_size(const Call& call, int64_t s, int64_t block) {
    return int(std::min<int64_t>(kWidth, call.h.shard_sizes[s] - block * kBlock));
}

}  // namespace

UnitScales::UnitScales(const Call& call, Arena& arena)
    : E_(call.h.E),
      s_out_(arena.take<float>(E_ * kWidth)),
      bias_(call.bias ? arena.take<float>(kWidth) : nullptr) {}

void UnitScales::fetch_soon(const Call& call, int64_t s, int64_t block) {
    const int64_t column = call.h.column_of(s) + block * kBlock, n = unit_size(call, s, block);
    for (int64_t e = 0; e < call.h.E; ++e) {
        fetch(call.scale_at(call.s_out, e * call.N + column), n * bytes_of(call.h.scale_dtype));
    }
}

void UnitScales::read(const Call& call, int64_t s, int64_t block) const {
    const int64_t column = call.h.column_of(s) + block * kBlock;
    const int n = unit_size(call, s, block);
    for (int64_t e = 0; e < E_; ++e) {
        call.f.to_float(call.scale_at(call.s_out, e * call.N + column), call.h.scale_dtype, n,
                        kWidth, s_out_ + e * kWidth);
    }
    if (!call.bias) return;
    call.f.to_float(call.bias + column * bytes_of(call.bias_dtype), call.bias_dtype, n, kWidth,
                    bias_);
}

OutScales UnitScales::from(int64_t at, const float* unit, const float* G) const {
    return {unit, G, E_, s_out_ + at, kWidth, bias_ ? bias_ + at : nullptr};
}

}  // namespace bmos
