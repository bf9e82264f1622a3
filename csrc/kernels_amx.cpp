// The matrix product on AMX tiles; everything else is AVX-512.

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace {

using bmos::kBlock;

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == bmos::kStateBytes, "the size of LDTILECFG's operand");

// Other libraries keep their tiles configured between calls, so theirs are restored at the end.
void begin(void* state) {
    _tile_storeconfig(state);
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = 16;
    }
    // gcc 12 takes the operand for 8 bytes, and would leave the others unwritten.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

void end(void* state) {
    if (*static_cast<const uint8_t*>(state)) {
        _tile_loadconfig(state);
    } else {
        _tile_release();
    }
}

// Two tiles of activations by two of weights.
void gemm_two(const int8_t* A, int64_t Kpad, const uint8_t* B, int32_t* C) {
    const int8_t* A1 = A + Kpad * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < Kpad; k += 64) {
        _tile_loadd(4, A, 64);
        _tile_loadd(6, B, 64);
        _tile_loadd(7, B + 1024, 64);
        _tile_loadd(5, A1, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        A += 1024;
        A1 += 1024;
        B += 2048;
    }
    constexpr int stride = kBlock * sizeof(int32_t);
    _tile_stored(0, C, stride);
    _tile_stored(1, C + 16, stride);
    _tile_stored(2, C + 16 * kBlock, stride);
    _tile_stored(3, C + 16 * kBlock + 16, stride);
}

void gemm_one(const int8_t* A, int64_t Kpad, const uint8_t* B, int32_t* C) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < Kpad; k += 64) {
        _tile_loadd(4, A, 64);
        _tile_loadd(6, B, 64);
        _tile_loadd(7, B + 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        A += 1024;
        B += 2048;
    }
    constexpr int stride = kBlock * sizeof(int32_t);
    _tile_stored(0, C, stride);
    _tile_stored(1, C + 16, stride);
}

void gemm(const int8_t* A, int tiles, int, int64_t Kpad, const uint8_t* B, int32_t* C) {
    for (; tiles >= 2; tiles -= 2) {
        gemm_two(A, Kpad, B, C);
        A += 2 * Kpad * 16;
        C += 2 * 16 * kBlock;
    }
    if (tiles) gemm_one(A, Kpad, B, C);
}

}  // namespace

const bmos::Kernels bmos::amx_parts = {
    "amx",   4,       nullptr, nullptr, nullptr, nullptr, nullptr,
    nullptr, nullptr, gemm,    begin,   end,     nullptr,
};
