// The functions of bmos.h: they check what they are given and hand it on.

#include "bmos.h"

#include <algorithm>
#include <cstring>

#include "call.h"

namespace bmos {
namespace {

bool shape_ok(int64_t K, const int64_t* shard_sizes, int64_t S) {
    return K >= 1 && K <= kMaxK && S >= 1 &&
           std::all_of(shard_sizes, shard_sizes + S, [](int64_t n) { return n >= 0; });
}

// dword[columns][32] of the rows of one block, of which `rows` exist, or byte[columns][4][32].
void pack_block(const uint8_t* bits, int64_t row_bytes, int rows, int64_t columns, bool bytewise,
                uint32_t* words) {
    for (int64_t column = 0; column < columns; ++column, words += kBlock) {
        const int64_t left = std::clamp<int64_t>(row_bytes - 4 * column, 0, 4);
        for (int row = 0; row < kBlock; ++row) {
            uint8_t bytes[4] = {};
            if (row < rows) {
                const uint8_t* from = bits + row * row_bytes + 4 * column;
                if (left == 4) {
                    std::memcpy(bytes, from, 4);
                } else {
                    std::copy(from, from + left, bytes);
                }
            }
            if (bytewise) {
                auto* to = reinterpret_cast<uint8_t*>(words) + row;
                for (int i = 0; i < 4; ++i) to[i * kBlock] = bytes[i];
            } else {
                words[row] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24;
            }
        }
    }
}

}  // namespace
}  // namespace bmos

using namespace bmos;

int bmos_abi() { return BMOS_ABI; }

const char* bmos_status(int status) {
    switch (status) {
        case BMOS_OK: return "it worked";
        case BMOS_NOT_PACKED: return "the weight was not prepared by this kernel; call prepare first";
        case BMOS_SHAPE:
            return "shapes or dtypes of x, logits, the prepared tensors, bias and shard_sizes do "
                   "not fit together";
        case BMOS_OTHER_ISA:
            return "the weight was prepared for another instruction set; prepare it again";
        default: return "there is not enough memory for the activations";
    }
}

int64_t bmos_packed_bytes(int64_t K, const int64_t* shard_sizes, int64_t S) {
    if (!shape_ok(K, shard_sizes, S)) return -1;
    int64_t blocks = 0;
    for (int64_t s = 0; s < S; ++s) blocks += blocks_of(shard_sizes[s]);
    return Header::bytes(S) + blocks * kBlock * ((K + kPad - 1) / kPad * kPad / 8);
}

int bmos_pack(const uint8_t* bits, int64_t K, const int64_t* shard_sizes, int64_t S, int64_t E,
              int scale_dtype, int mode, void* packed, int threads) {
    if (!shape_ok(K, shard_sizes, S) || E < 1) return BMOS_SHAPE;
    auto* h = static_cast<Header*>(packed);
    h->magic = Header::kMagic;
    h->scale_dtype = int8_t(scale_dtype);
    h->bytewise = kernels().bytewise;
    h->planes = mode;
    h->K = K;
    h->E = E;
    h->S = S;
    std::memcpy(h->shard_sizes, shard_sizes, S * sizeof(int64_t));
    const int64_t row_bytes = (K + 7) / 8, Kp = h->K_padded();
    int64_t blocks = 0;
    for (int64_t s = 0; s < S; ++s) blocks += blocks_of(shard_sizes[s]);
    run(threads, [&](const Team& team) {
        each_shard(*h, team.part(blocks), [&](int64_t s, int64_t first, int64_t last) {
            auto* words = const_cast<uint32_t*>(h->words_of(s));
            for (int64_t b = first; b < last; ++b) {
                const int64_t row = b * kBlock;
                pack_block(bits + (h->column_of(s) + row) * row_bytes, row_bytes,
                           int(std::min<int64_t>(kBlock, h->shard_sizes[s] - row)), Kp / 32,
                           h->bytewise, words + b * Kp);
            }
        });
    });
    return BMOS_OK;
}

int bmos_dense(const void* x, int x_dtype, int64_t M, int64_t K, const void* weight,
               int weight_dtype, int64_t rows, float* y, int threads) {
    if (K < 1 || M < 0 || rows < 1) return BMOS_SHAPE;
    if (M == 0) return BMOS_OK;
    return dense(x, x_dtype, M, K, weight, weight_dtype, rows, y, threads) ? BMOS_OK : BMOS_MEMORY;
}

int bmos_linear(const void* x, int x_dtype, int64_t M, int64_t K, const float* logits,
                const void* packed, const void* s_in, const void* s_out, const void* router,
                int scale_dtype, int64_t S, int64_t E, const void* bias, int bias_dtype, void* y,
                int64_t N, int threads) {
    const auto* h = static_cast<const Header*>(packed);
    if (h->magic != Header::kMagic) return BMOS_NOT_PACKED;
    if (h->bytewise != kernels().bytewise) return BMOS_OTHER_ISA;
    if (h->K != K || h->column_of(h->S) != N || M < 0) return BMOS_SHAPE;
    if (h->S != S || h->E != E || h->scale_dtype != scale_dtype) return BMOS_SHAPE;
    if (M == 0 || N == 0) return BMOS_OK;
    const Call call = {kernels(),
                       *h,
                       static_cast<const char*>(x),
                       x_dtype,
                       M,
                       N,
                       logits,
                       static_cast<const char*>(s_in),
                       static_cast<const char*>(s_out),
                       static_cast<const char*>(router),
                       static_cast<const char*>(bias),
                       bias_dtype,
                       static_cast<char*>(y),
                       threads};
    const bool tables = M <= call.f.max_table_tokens[h->planes];
    return (tables ? with_tables(call) : as_product(call)) ? BMOS_OK : BMOS_MEMORY;
}
