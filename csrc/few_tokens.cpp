// The layer for few tokens: a table look-up replaces four multiplications and additions, and the
// weights are read once, at the speed of the memory.

#include <algorithm>
#include <cstring>

#include "call.h"

namespace bmos {
namespace {

// Fetch what will be read soon into the cache.
void fetch(const char* from, const char* to) {
    for (; from < to; from += 64) __builtin_prefetch(from, 0, 2);
}

// What a thread has for itself.
struct Own {
    float* G;         // [M, S, E]
    int32_t* totals;  // [kUnit, kBlock]
    Grid* grids;      // [M]
    uint8_t* sums;    // [M, Kp/4, 16, 2]
    int32_t* factor;  // [M, Kp/16]
    BlockScales scales;

    Own(const Call& c, Arena& arena)
        : G(arena.take<float>(c.M * c.h.S * c.h.E)),
          totals(arena.take<int32_t>(kUnit * kBlock)),
          grids(arena.take<Grid>(c.M)),
          sums(arena.take<uint8_t>(c.M * c.h.K_padded() * 8)),
          factor(arena.take<int32_t>(c.M * c.h.K_padded() / 16)),
          scales(c, arena) {}

    Tables tables(int64_t m, int64_t Kp) const { return {sums + m * Kp * 8, factor + m * Kp / 16}; }
};

class FewTokens {
public:
    FewTokens(const Call& call, Arena& arena)
        : c(call),
          h(call.h),
          Kp(h.K_padded()),
          chunks(chunks_of(h.K)),
          x(arena.take<float>(c.M * Kp)),
          t(arena.take<float>(c.M * h.S * Kp)),
          parts(arena.take<float>(c.M * chunks * h.S * h.E)),
          max_bits(arena.take<int32_t>(c.M * h.S * chunks)) {
        Arena count;
        const Own own(c, count);
        own_bytes = count.used();
        owned = arena.take<char>(own_bytes * c.threads);
    }

    void operator()(const Team& team) const {
        Arena arena(owned + team.thread() * own_bytes);
        Own own(c, arena);
        const Range items = team.part(c.M * chunks);
        read_x(items);
        if (c.routed()) {
            partial_logits(items);
            team.wait();
        }
        mix_experts(own);
        scale_x(items, own);
        team.wait();
        int64_t blocks = 0;
        for (int64_t s = 0; s < h.S; ++s) blocks += blocks_of(h.shard_sizes[s]);
        each_shard(h, team.part(blocks), [&](int64_t s, int64_t first, int64_t last) {
            multiply(s, first, last, own);
        });
    }

private:
    const Call& c;
    const Header& h;
    int64_t Kp, chunks, own_bytes;
    float* x;           // [M, Kp]
    float* t;           // [M, S, Kp]: x * s_in
    float* parts;       // [M, chunks, S, E]: the logits of each chunk
    int32_t* max_bits;  // [M, S, chunks]: of t
    char* owned;        // [threads, own_bytes]

    // An item is one chunk of K of one token.
    void read_x(Range items) const {
        for (int64_t item = items.first; item < items.last; ++item) {
            const int64_t m = item / chunks, i = item % chunks, k = i * kChunk;
            c.f.to_float(c.x_at(m, k), c.x_dtype, chunk_size(h.K, i), chunk_padded(h.K, i),
                         x + m * Kp + k);
        }
    }

    void partial_logits(Range items) const {
        const int64_t rows = h.S * h.E;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t item = items.first; item < items.last; ++item) {
                const int64_t m = item / chunks, i = item % chunks, k = i * kChunk;
                // The scales are read next, and lie as the router does.
                const int64_t at = r * h.K + k;
                fetch(c.scale_at(c.s_in, at), c.scale_at(c.s_in, at + chunk_size(h.K, i)));
                c.f.dot(x + m * Kp + k, 0, 1, c.scale_at(c.router, at), h.scale_dtype,
                        chunk_size(h.K, i), parts + item * rows + r);
            }
        }
    }

    void mix_experts(const Own& own) const {
        for (int64_t m = 0; m < c.M; ++m) {
            for (int64_t s = 0; s < h.S; ++s) {
                float* G = own.G + (m * h.S + s) * h.E;
                if (c.routed()) {
                    softmax(parts + (m * chunks * h.S + s) * h.E, chunks, h.S * h.E, h.E, G);
                } else if (c.logits) {
                    softmax(c.logits + (m * h.S + s) * h.E, 1, 0, h.E, G);
                } else {
                    *G = 1.0f;
                }
            }
        }
    }

    void scale_x(Range items, const Own& own) const {
        for (int64_t s = 0; s < h.S; ++s) {
            for (int64_t item = items.first; item < items.last; ++item) {
                const int64_t m = item / chunks, i = item % chunks, k = i * kChunk;
                const int64_t row = m * h.S + s;
                int32_t* bits = max_bits + row * chunks + i;
                *bits = 0;
                c.f.mix(x + m * Kp + k, 0, 1, c.scale_at(c.s_in, s * h.E * h.K + k), h.K,
                        h.scale_dtype, h.E, own.G + row * h.E, chunk_size(h.K, i),
                        chunk_padded(h.K, i), t + row * Kp + k, bits);
            }
        }
    }

    // The out-scales of a unit of blocks.
    void fetch_scales(int64_t s, int64_t block) const {
        const int64_t n = block * kBlock;
        const int64_t size = std::min<int64_t>(kUnit * kBlock, h.shard_sizes[s] - n);
        for (int64_t e = 0; e < h.E; ++e) {
            const int64_t at = e * c.N + h.column_of(s) + n;
            fetch(c.scale_at(c.s_out, at), c.scale_at(c.s_out, at + size));
        }
    }

    // y of the blocks first to last of shard s.
    void multiply(int64_t s, int64_t first, int64_t last, const Own& own) const {
        const int64_t N = h.shard_sizes[s], start = h.column_of(s);
        const uint32_t* words = h.words_of(s);
        fetch_scales(s, first);
        for (int64_t m = 0; m < c.M; ++m) {
            const int32_t* bits = max_bits + (m * h.S + s) * chunks;
            own.grids[m] = Grid(*std::max_element(bits, bits + chunks), h.planes);
            if (!own.grids[m].finite()) continue;
            c.f.tables(t + (m * h.S + s) * Kp, Kp, own.grids[m].inverse,
                       own.tables(m, Kp), words + first * Kp);
        }
        for (int64_t block = first; block < last; block += kUnit) {
            const int count = int(std::min<int64_t>(kUnit, last - block));
            if (block + kUnit < last) fetch_scales(s, block + kUnit);
            for (int64_t m = 0; m < c.M; ++m) {
                const bool more = m == 0 && block + 2 * kUnit <= last;
                if (own.grids[m].finite()) {
                    const uint32_t* unit = words + block * Kp;
                    c.f.gemv(unit, count, Kp, own.tables(m, Kp), more ? unit + kUnit * Kp : unit, own.totals);
                } else {
                    std::memset(own.totals, 0, kUnit * kBlock * sizeof(int32_t));
                }
                for (int i = 0; i < count; ++i) {
                    const int64_t n = (block + i) * kBlock;
                    const int size = int(std::min<int64_t>(kBlock, N - n));
                    own.scales.read(c, start + n, size);
                    c.f.finish(own.totals + i * kBlock, 0, 0, nullptr, own.grids[m].unit,
                               own.G + (m * h.S + s) * h.E, h.E, own.scales.s_out(),
                               own.scales.bias(), size, c.y_at(m, start + n), c.x_dtype);
                }
            }
        }
    }
};

}  // namespace

bool few_tokens(const Call& call) {
    Arena count;
    const FewTokens counted(call, count);
    char* memory = Scratch::of_this_thread().reserve(count.used());
    if (!memory) return false;
    Arena arena(memory);
    run(call.threads, FewTokens(call, arena));
    return true;
}

}  // namespace bmos
