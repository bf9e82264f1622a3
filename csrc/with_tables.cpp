// The layer with tables: a look-up replaces four multiplications and additions. For one token the
// weights are read at the speed of the memory.

#include <algorithm>
#include <cstring>

#include "call.h"

namespace bmos {
namespace {

// Tables for each token and shard.
int parts_of(const Call& c) { return c.h.planes == BMOS_EXACT ? 2 : 1; }

// The bytes of the tables of one part.
int64_t table_bytes(const Call& c) { return c.h.K_padded() / 4 * c.f.table_bytes; }

// What a thread has for itself.
struct Own {
    float* G;         // [M, S, E]
    int32_t* totals;  // [parts, kUnit, kBlock]
    Grid* grids;      // [M]
    Tables tables;    // [parts], of one token
    UnitScales scales;

    Own(const Call& c, Arena& arena)
        : G(arena.take<float>(c.M * c.h.S * c.h.E)),
          totals(arena.take<int32_t>(parts_of(c) * kUnit * kBlock)),
          grids(arena.take<Grid>(c.M)),
          tables(take_tables(arena, c)),
          scales(c, arena) {}

    static Tables take_tables(Arena& arena, const Call& c) {
        const int parts = parts_of(c);
        return {arena.take<uint8_t>(parts * table_bytes(c)),
                arena.take<int32_t>(parts * c.h.K_padded() / 16)};
    }
};

class WithTables {
public:
    WithTables(const Call& call, Arena& arena)
        : c(call),
          h(call.h),
          Kp(h.K_padded()),
          chunks(chunks_of(h.K)),
          parts(parts_of(c)),
          x(arena.take<float>(c.M * Kp)),
          t(arena.take<float>(c.M * h.S * Kp)),
          part_logits(arena.take<float>(c.M * chunks * h.S * h.E)),
          max_bits(arena.take<int32_t>(c.M * h.S * chunks)),
          sums(arena.take<uint8_t>(c.M > 1 ? c.M * h.S * parts * table_bytes(c) : 0)),
          factor(arena.take<int32_t>(c.M > 1 ? c.M * h.S * parts * Kp / 16 : 0)) {
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
        int64_t all = 0;
        for (int64_t s = 0; s < h.S; ++s) all += blocks_of(h.shard_sizes[s]);
        const Range blocks = team.part(all);
        if (c.M > 1) {
            const Range rows = team.part(c.M * h.S);
            const uint32_t* first = h.words_of(0) + blocks.first * Kp;
            for (int64_t row = rows.first; row < rows.last; ++row) {
                tabulate(row, shared_tables(row), first);
            }
            team.wait();
        }
        each_shard(h, blocks, [&](int64_t s, int64_t first, int64_t last) {
            multiply(s, first, last, own);
        });
    }

private:
    const Call& c;
    const Header& h;
    int64_t Kp, chunks, parts, own_bytes;
    float* x;           // [M, Kp]
    float* t;           // [M, S, Kp]: x * s_in
    float* part_logits;  // [M, chunks, S, E]: of each chunk
    int32_t* max_bits;  // [M, S, chunks]: of t
    // For more than one token the threads share the tables; one token's tables are built by each
    // thread for itself, which is faster than a barrier and the transfer between caches.
    uint8_t* sums;    // [M, S, parts, Kp/4, c.f.table_bytes]
    int32_t* factor;  // [M, S, parts, Kp/16]
    char* owned;      // [threads, own_bytes]

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
                fetch(c.scale_at(c.s_in, at), chunk_size(h.K, i) * bytes_of(h.scale_dtype));
                c.f.dot(x + m * Kp + k, 0, 1, c.scale_at(c.router, at), h.scale_dtype,
                        chunk_size(h.K, i), part_logits + item * rows + r);
            }
        }
    }

    void mix_experts(const Own& own) const {
        for (int64_t m = 0; m < c.M; ++m) {
            for (int64_t s = 0; s < h.S; ++s) {
                float* G = own.G + (m * h.S + s) * h.E;
                if (c.routed()) {
                    softmax(part_logits + (m * chunks * h.S + s) * h.E, chunks, h.S * h.E, h.E, G);
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

    // A row is m * S + s.
    Grid grid_of(int64_t row) const {
        const int32_t* bits = max_bits + row * chunks;
        return Grid(*std::max_element(bits, bits + chunks), h.planes);
    }
    Tables shared_tables(int64_t row) const {
        return part_of({sums, factor}, row * parts);
    }
    Tables part_of(Tables first, int64_t index) const {
        return {first.sums + index * table_bytes(c), first.factor + index * Kp / 16};
    }
    void tabulate(int64_t row, Tables tables, const uint32_t* next) const {
        const Grid grid = grid_of(row);
        if (!grid.finite()) return;
        for (int i = 0; i < parts; ++i) {
            const Part part = parts == 1 ? Part::whole : i == 0 ? Part::lower : Part::upper;
            c.f.tables(t + row * Kp, Kp, grid.inverse, part, part_of(tables, i), next);
        }
    }

    // What token m fetches while it looks up a part of `unit`. Another unit follows if `more`.
    Ahead ahead_of(const uint32_t* unit, bool more, int64_t m, bool last_part) const {
        const uint32_t* next = unit + kUnit * Kp;
        const uint32_t* then = more && m == c.M - 1 && last_part ? next : unit;
        const int64_t lines = (kUnit * kBlock / 16 + c.M - 1) / c.M;  // of 16 dwords
        const int64_t at = m * lines * 16 * (Kp / 32);
        // Two tokens would each have to fetch more than the look-ups leave time for.
        const bool shared = c.M > 2 && more && at < kUnit * Kp;
        return {then, next + at, shared ? int(lines) : 0};
    }

    // y of the blocks first to last of shard s.
    void multiply(int64_t s, int64_t first, int64_t last, const Own& own) const {
        const int64_t N = h.shard_sizes[s], start = h.column_of(s);
        const uint32_t* words = h.words_of(s);
        UnitScales::fetch_soon(c, s, first);
        if (c.M == 1) tabulate(s, own.tables, words + first * Kp);
        for (int64_t m = 0; m < c.M; ++m) own.grids[m] = grid_of(m * h.S + s);
        for (int64_t block = first; block < last; block += kUnit) {
            const int count = int(std::min<int64_t>(kUnit, last - block));
            if (block + kUnit < last) UnitScales::fetch_soon(c, s, block + kUnit);
            const int64_t column = start + block * kBlock;
            const int n = int(std::min<int64_t>(count * kBlock, N - block * kBlock));
            own.scales.read(c, s, block);
            const uint32_t* unit = words + block * Kp;
            for (int64_t m = 0; m < c.M; ++m) {
                const int64_t row = m * h.S + s;
                const Tables tables = c.M == 1 ? own.tables : shared_tables(row);
                for (int i = 0; i < parts; ++i) {
                    const Ahead ahead =
                        ahead_of(unit, block + 2 * kUnit <= last, m, i == parts - 1);
                    int32_t* totals = own.totals + i * kUnit * kBlock;
                    if (own.grids[m].finite()) {
                        c.f.gemv(unit, count, Kp, part_of(tables, i), ahead, totals);
                    } else {
                        std::memset(totals, 0, kUnit * kBlock * sizeof(int32_t));
                    }
                }
                c.f.finish({own.totals, kUnit * kBlock, parts == 1 ? 0 : kTwoParts, nullptr},
                           own.scales.from(0, &own.grids[m].unit, own.G + row * h.E), 1, n,
                           c.y_at(m, column), 0, c.x_dtype);
            }
        }
    }
};

// The tables of the tokens that share one pass over the weights stay in the second-level cache.
constexpr int64_t kTableBytes = 1 << 19;

}  // namespace

bool with_tables(const Call& all) {
    const int64_t fit = kTableBytes / (parts_of(all) * table_bytes(all) * all.h.S);
    const int64_t step = std::clamp<int64_t>(fit, 1, 16);
    for (int64_t m = 0; m < all.M; m += step) {
        const Call call = all.some_tokens(m, std::min(step, all.M - m));
        Arena count;
        const WithTables counted(call, count);
        char* memory = Scratch::of_this_thread().reserve(count.used());
        if (!memory) return false;
        Arena arena(memory);
        run(call.threads, WithTables(call, arena));
    }
    return true;
}

}  // namespace bmos
