// The packed weights of a layer: a header that says what they are, and the words behind it.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace bmos {

inline int64_t blocks_of(int64_t N) { return (N + kBlock - 1) / kBlock; }

struct Header {
    static constexpr uint32_t kMagic = 0x534f4d42;  // "BMOS"

    uint32_t magic;
    int8_t scale_dtype, bytewise;  // see Kernels::bytewise
    int16_t planes;
    int64_t K, E, S;
    int64_t shard_sizes[1];  // S of them

    static int64_t bytes(int64_t S) { return (32 + 8 * S + 63) / 64 * 64; }
    int64_t K_padded() const { return (K + kPad - 1) / kPad * kPad; }
    // The first output of a shard, and for S the number of all outputs.
    int64_t column_of(int64_t shard) const {
        int64_t n = 0;
        for (int64_t s = 0; s < shard; ++s) n += shard_sizes[s];
        return n;
    }
    // dword[ceil(N/32)][Kpad/32][32] of a shard.
    const uint32_t* words_of(int64_t shard) const {
        int64_t blocks = 0;
        for (int64_t s = 0; s < shard; ++s) blocks += blocks_of(shard_sizes[s]);
        const char* start = reinterpret_cast<const char*>(this) + bytes(S);
        return reinterpret_cast<const uint32_t*>(start) + blocks * K_padded();
    }
};

// The functions of the instruction set in use.
const Kernels& kernels();

}  // namespace bmos
