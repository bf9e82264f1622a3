// One call of the layer, and what both ways to compute it share.
//
//     G[M,E] = softmax(x[M,K] @ R[E,K].T)
//     y[M,N] = ((x * (G @ S_in[E,K])) @ B[N,K].T) * (G @ S_out[E,N]) + bias[N]

#pragma once

#include <cstdint>

#include "layer.h"
#include "team.h"

namespace bmos {

struct Call {
    const Kernels& f;
    const Header& h;
    const char* x;
    int x_dtype;
    int64_t M, N;
    const float* logits;  // [M, S, E] or null
    const char *s_in, *s_out, *router;
    const char* bias;  // [N] or null
    int bias_dtype;
    char* y;
    int threads;

    // Whether this call computes the logits.
    bool routed() const { return !logits && h.E > 1; }
    Call some_tokens(int64_t first, int64_t count) const;
    const char* x_at(int64_t m, int64_t k) const;
    char* y_at(int64_t m, int64_t n) const;
    const char* scale_at(const char* scales, int64_t index) const;
};

// Both give the same bits. False: there is not enough memory.
bool with_tables(const Call& call);  // every phase is split along K or N
bool as_product(const Call& call);   // the first phase is split along M

// y[M, rows] of bmos_dense. Of a router, both ways to compute a layer give its logits these bits.
bool dense(const void* x, int x_dtype, int64_t M, int64_t K, const void* weight, int dtype,
           int64_t rows, float* y, int threads);

// Fetch what will be read soon into the cache.
inline void fetch(const void* from, int64_t bytes) {
    const char* p = static_cast<const char*>(from);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

int64_t bytes_of(int dtype);
int64_t chunks_of(int64_t K);
int chunk_size(int64_t K, int64_t chunk);
// A chunk of fp32 activations is padded with zeros, as the whole row is.
int chunk_padded(int64_t K, int64_t chunk);

// G[e] of logits[c * stride + e], which are summed over the chunks c in their order.
void softmax(const float* logits, int64_t chunks, int64_t stride, int64_t E, float* G);

// How the activations of one token and shard become integers: x * s_in = unit * integer.
struct Grid {
    float unit, inverse;

    Grid() = default;
    // From the bits of the largest absolute value.
    Grid(int32_t max_bits, int planes);
    // An infinity or NaN anywhere in the row makes its unit, and so all of y, NaN.
    bool finite() const { return unit == unit; }
};

// s_out[E][kUnit * kBlock] and the bias of a unit of blocks, in fp32.
class UnitScales {
public:
    UnitScales(const Call& call, Arena& arena);
    // Fetch s_out of the unit that begins with this block of shard s.
    static void fetch_soon(const Call& call, int64_t s, int64_t block);
    void read(const Call& call, int64_t s, int64_t block) const;
    // From output `at` of the unit on, for tokens with these units and gates.
    OutScales from(int64_t at, const float* unit, const float* G) const;

private:
    int64_t E_;
    float *s_out_, *bias_;
};

// Calls body(s, first, last) for the blocks `range` of all shards' blocks, shard by shard.
template <class Body>
void each_shard(const Header& h, Range range, const Body& body) {
    int64_t before = 0;
    for (int64_t s = 0; s < h.S; ++s) {
        const int64_t blocks = blocks_of(h.shard_sizes[s]);
        const int64_t first = range.first > before ? range.first - before : 0;
        const int64_t last = range.last - before < blocks ? range.last - before : blocks;
        if (first < last) body(s, first, last);
        before += blocks;
    }
}

}  // namespace bmos
