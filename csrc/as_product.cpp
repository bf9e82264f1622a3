// The layer as a matrix product: activations become tiles of signed bytes, one plane of tiles for
// every eight bits, and the weights of a block of outputs become bytes of 0 and 1 once for all of
// the tokens whose tiles the second-level cache holds.

#include <algorithm>
#include <cstring>

#include "call.h"

namespace bmos {
namespace {

// The tiles of the tokens that are multiplied at once stay in the second-level cache.
constexpr int64_t kTileBytesInCache = 1 << 20;
// The bytes of a slice of K of a block of outputs stay in the first-level cache, and so do the
// sums of all those tokens and planes.
constexpr int64_t kSlice = 512;
constexpr int64_t kMaxRows = 256;

// Tokens that are multiplied at once.
int64_t tokens_at_once(const Call& c) {
    const int64_t fit = kTileBytesInCache / (c.h.K_padded() * c.h.planes) / kTile * kTile;
    const int64_t all = (c.M + kTile - 1) / kTile * kTile;
    return std::min(all, std::clamp<int64_t>(fit, kTile, kMaxRows / c.h.planes));
}

// Rows and arrays of fp32 activations lie so that no two of them have the same place in a page:
// a load that is 4096 bytes behind a store would wait for it.
int64_t row_size(const Call& c) { return c.h.K_padded() + 16; }
constexpr int64_t kHalfPage = 512;

// What a thread has for itself.
struct Own {
    float* x;       // [kTokens, row_size]
    float* t;       // [kTokens, row_size]
    float* logits;  // [kTokens, chunks, E]
    uint8_t* B;     // [kSlice/64, 2, 16, 64]
    int32_t* sums;  // [kMaxRows/16, 16, kBlock]
    char* state;
    UnitScales scales;

    Own(const Call& c, Arena& arena)
        : x(arena.take<float>(kTokens * row_size(c) + kHalfPage)),
          t(arena.take<float>(kTokens * row_size(c))),
          logits(arena.take<float>(kTokens * chunks_of(c.h.K) * c.h.E)),
          B(arena.take<uint8_t>(kBlock * kSlice)),
          sums(arena.take<int32_t>(kMaxRows * kBlock)),
          state(arena.take<char>(kStateBytes)),
          scales(c, arena) {}
};

class AsProduct {
public:
    AsProduct(const Call& call, Arena& arena)
        : c(call),
          h(call.h),
          Kp(h.K_padded()),
          tokens(tokens_at_once(call)),
          A(arena.take<int8_t>(tokens * h.planes * Kp)),
          plane_sums(arena.take<int32_t>(tokens * h.planes)),
          units(arena.take<float>(tokens)),
          G(arena.take<float>(tokens * h.E)) {
        Arena count;
        const Own own(c, count);
        own_bytes = count.used();
        owned = arena.take<char>(own_bytes * c.threads);
    }

    void operator()(const Team& team) const {
        Arena arena(owned + team.thread() * own_bytes);
        Own own(c, arena);
        for (int64_t m0 = 0; m0 < c.M; m0 += tokens) {
            const int64_t M = std::min(tokens, c.M - m0);
            for (int64_t s = 0; s < h.S; ++s) {
                const Range blocks = team.part(blocks_of(h.shard_sizes[s]));
                if (blocks.first < blocks.last) fetch_block(s, blocks.first);
                const Range some = team.part(M, kTokens);
                for (int64_t m = some.first; m < some.last; m += kTokens) {
                    quantize(s, m0, m, int(std::min<int64_t>(kTokens, some.last - m)), own);
                }
                if (some.first < some.last && some.last == M) clear_rows(M);
                team.wait();
                c.f.begin(own.state);
                for (int64_t b = blocks.first; b < blocks.last; b += kUnit) {
                    multiply_unit(s, b, blocks.last, m0, M, own);
                }
                c.f.end(own.state);
                team.wait();
            }
        }
    }

private:
    const Call& c;
    const Header& h;
    int64_t Kp, tokens, own_bytes;
    int8_t* A;            // [tokens/16, planes, Kp/64, 16, 64]
    int32_t* plane_sums;  // [tokens, planes]
    float* units;         // [tokens]
    float* G;             // [tokens, E]
    char* owned;          // [threads, own_bytes]

    // The first byte of row m in plane 0 of its tile.
    int8_t* row_of(int64_t m) const {
        return A + m / kTile * h.planes * kTile * Kp + m % kTile * kPad;
    }

    // T tokens from m0 + m on become rows of tiles.
    void quantize(int64_t s, int64_t m0, int64_t m, int T, const Own& own) const {
        const int64_t chunks = chunks_of(h.K), E = h.E, ld = row_size(c);
        for (int t = 0; t < T; ++t) {
            c.f.to_float(c.x_at(m0 + m + t, 0), c.x_dtype, int(h.K), int(Kp), own.x + t * ld);
        }
        for (int64_t i = 0; c.routed() && i < chunks; ++i) {
            const int64_t k = i * kChunk;
            for (int64_t e = 0; e < E; ++e) {
                float dots[kTokens];
                c.f.dot(own.x + k, ld, T, c.scale_at(c.router, (s * E + e) * h.K + k),
                        h.scale_dtype, chunk_size(h.K, i), dots);
                for (int t = 0; t < T; ++t) own.logits[(t * chunks + i) * E + e] = dots[t];
            }
        }
        for (int t = 0; t < T; ++t) {
            float* G_row = G + (m + t) * E;
            if (c.routed()) {
                softmax(own.logits + t * chunks * E, chunks, E, E, G_row);
            } else if (c.logits) {
                softmax(c.logits + ((m0 + m + t) * h.S + s) * E, 1, 0, E, G_row);
            } else {
                *G_row = 1.0f;
            }
        }
        int32_t max_bits[kTokens] = {};
        c.f.mix(own.x, ld, T, c.scale_at(c.s_in, s * E * h.K), h.K, h.scale_dtype, E, G + m * E,
                int(h.K), int(Kp), own.t, max_bits);
        for (int t = 0; t < T; ++t) {
            const Grid grid(max_bits[t], h.planes);
            units[m + t] = grid.unit;
            if (!grid.finite()) std::memset(own.t + t * ld, 0, Kp * sizeof(float));
            const float inverse = grid.finite() ? grid.inverse : 0.0f;
            c.f.digits(own.t + t * ld, Kp, inverse, h.planes, row_of(m + t), kTile * Kp,
                       plane_sums + (m + t) * h.planes);
        }
    }

    // The rows behind the last token of its tile are multiplied too, where a tile is one operand.
    void clear_rows(int64_t M) const {
        for (int64_t m = M; m % kTile; ++m) {
            for (int64_t row = 0; row < h.planes * Kp / kPad; ++row) {
                std::memset(row_of(m) + row * kTile * kPad, 0, kPad);
            }
        }
    }

    void fetch_block(int64_t s, int64_t b) const {
        fetch(h.words_of(s) + b * Kp, Kp * sizeof(uint32_t));
    }

    // The unit of blocks from `first` on, as far as `last`, of shard s for the M tokens from m0 on.
    void multiply_unit(int64_t s, int64_t first, int64_t last, int64_t m0, int64_t M,
                       const Own& own) const {
        own.scales.read(c, s, first);
        if (first + kUnit < last) UnitScales::fetch_soon(c, s, first + kUnit);
        for (int64_t b = first; b < std::min(first + kUnit, last); ++b) {
            multiply(s, b, (b - first) * kBlock, b + 1 < last, m0, M, own);
        }
    }

    // Block b of shard s, whose scales are own.scales' from `at` on. The next block is fetched
    // meanwhile if `fetch_next`: the processor's own prefetcher stops at each page's end, and would
    // wait for the memory there.
    void multiply(int64_t s, int64_t b, int64_t at, bool fetch_next, int64_t m0, int64_t M,
                  const Own& own) const {
        const int64_t column = h.column_of(s) + b * kBlock;
        const int n = int(std::min<int64_t>(kBlock, h.shard_sizes[s] - b * kBlock));
        const uint32_t* words = h.words_of(s) + b * Kp;
        const int tiles = int((M + kTile - 1) / kTile * h.planes);
        for (int64_t k = 0; k < Kp; k += kSlice) {
            const int64_t width = std::min(kSlice, Kp - k);
            c.f.expand(words + k, width, own.B);
            c.f.gemm(A + k * kTile, kTile * Kp, tiles, int(std::min<int64_t>(kTile, M)), width,
                     own.B, own.sums, k > 0, fetch_next ? words + Kp + k : nullptr);
        }
        constexpr int64_t tile_sums = kTile * kBlock;
        for (int64_t m = 0; m < M; m += kTile) {
            c.f.finish({own.sums + m / kTile * h.planes * tile_sums, tile_sums, h.planes,
                        plane_sums + m * h.planes},
                       own.scales.from(at, units + m, G + m * h.E),
                       int(std::min<int64_t>(kTile, M - m)), n, c.y_at(m0 + m, column),
                       c.N * bytes_of(c.x_dtype), c.x_dtype);
        }
    }
};

}  // namespace

bool as_product(const Call& call) {
    Arena count;
    const AsProduct counted(call, count);
    char* memory = Scratch::of_this_thread().reserve(count.used());
    if (!memory) return false;
    Arena arena(memory);
    run(call.threads, AsProduct(call, arena));
    return true;
}

}  // namespace bmos
