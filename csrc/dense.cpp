// Products with dense weights of 8, 16 or 32 bits, in fp32: the logits of routers, which have few
// rows, and for few tokens those of the vocabulary.
//
// Of some rows of the weight and some tokens, both so few that they stay in the second-level cache,
// it takes a chunk of K at a time, so that the tokens' numbers come from the first level.

#include <algorithm>

#include "call.h"

namespace bmos {
namespace {

constexpr int kTokensAtOnce = 4 * kTokens;
constexpr int kRowsAtOnce = 8;
constexpr int kAhead = 4;  // the chunk of a row that is fetched, counted from the one that is read
// From so many rows a thread on they are what is divided among threads, else the tokens are.
constexpr int64_t kRowsToDivide = 8 * kRowsAtOnce;

struct Dense {
    const Kernels& f;
    const char* weight;
    int dtype;
    int64_t K, row_bytes, chunk_bytes;

    // Chunk j of R rows from `row` on, in the order in which they are read; the next rows follow.
    const char* chunk(int64_t row, int R, int64_t j) const {
        const int64_t chunks = chunks_of(K);
        for (; j >= chunks * R; j -= chunks * R) row += R;
        return weight + (row + j % R) * row_bytes + j / R * chunk_bytes;
    }

    // out[t * ldo + r] for T <= kTokens tokens of xs, whose rows are ldx apart, and R <= kRowsAtOnce
    // rows from `row` on.
    void dots(const float* xs, int64_t ldx, int T, int64_t row, int R, float* out,
              int64_t ldo) const {
        float sums[kRowsAtOnce][kTokens];
        for (int64_t i = 0, j = 0; i < chunks_of(K); ++i) {
            for (int r = 0; r < R; ++r, ++j) {
                fetch(chunk(row, R, j + kAhead), chunk_bytes);
                float dots[kTokens];
                f.dot(xs + i * kChunk, ldx, T, chunk(row, R, j), dtype, chunk_size(K, i), dots);
                for (int t = 0; t < T; ++t) sums[r][t] = i ? sums[r][t] + dots[t] : dots[t];
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) out[t * ldo + r] = sums[r][t];
        }
    }
};

}  // namespace

bool dense(const void* x, int x_dtype, int64_t M, int64_t K, const void* weight, int dtype,
           int64_t rows, float* y, int threads) {
    const int64_t size = bytes_of(dtype);
    const Dense d = {kernels(), static_cast<const char*>(weight), dtype, K, K * size, kChunk * size};
    const int64_t ldx = (K + kPad - 1) / kPad * kPad, x_bytes = K * bytes_of(x_dtype);
    const int64_t floats = std::min<int64_t>(M, kTokensAtOnce) * ldx;
    auto* xs = reinterpret_cast<float*>(
        Scratch::of_this_thread().reserve(threads * floats * sizeof(float)));
    if (!xs) return false;
    run(threads, [&](const Team& team) {
        const bool by_rows = rows >= kRowsToDivide * threads;
        const Range tokens = by_rows ? Range{0, M} : team.part(M, kTokens);
        const Range mine = by_rows ? team.part(rows, kRowsAtOnce) : Range{0, rows};
        float* own = xs + team.thread() * floats;
        for (int64_t m = tokens.first; m < tokens.last; m += kTokensAtOnce) {
            const int64_t count = std::min<int64_t>(kTokensAtOnce, tokens.last - m);
            for (int64_t t = 0; t < count; ++t) {
                d.f.to_float(static_cast<const char*>(x) + (m + t) * x_bytes, x_dtype, int(K),
                             int(ldx), own + t * ldx);
            }
            for (int64_t row = mine.first; row < mine.last; row += kRowsAtOnce) {
                const int R = int(std::min<int64_t>(kRowsAtOnce, mine.last - row));
                for (int64_t t = 0; t < count; t += kTokens) {
                    const int T = int(std::min<int64_t>(kTokens, count - t));
                    d.dots(own + t * ldx, ldx, T, row, R, y + (m + t) * rows + row, rows);
                }
            }
        }
    });
    return true;
}

}  // namespace bmos
