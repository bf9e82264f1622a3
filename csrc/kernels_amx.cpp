// The matrix product on AMX tiles; everything else is AVX-512.

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace bmos::amx {

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

constexpr int kStride = kBlock * sizeof(int32_t);
constexpr int kTileSums = 16 * kBlock;

// The cache lines that are fetched in each step of 64 columns. The words of 64 columns of a block
// have kLines; all of a slice at once would keep the tiles' own loads waiting.
struct NextLines {
    const uint32_t* part;
    int lines;

    void fetch() {
        for (int i = 0; i < lines; ++i, part += 16) {
            _mm_prefetch(reinterpret_cast<const char*>(part), _MM_HINT_T1);
        }
    }
};
constexpr int kLines = kBlock * 64 / 8 / 64;

// Two tiles of activations by two of weights.
void gemm_two(const int8_t* A, int64_t stride, int64_t width, const uint8_t* B, int32_t* C,
              bool add, NextLines next) {
    if (add) {
        _tile_loadd(0, C, kStride);
        _tile_loadd(1, C + 16, kStride);
        _tile_loadd(2, C + kTileSums, kStride);
        _tile_loadd(3, C + kTileSums + 16, kStride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < width; k += 64) {
        next.fetch();
        _tile_loadd(6, B, 64);
        _tile_loadd(4, A, 64);
        _tile_loadd(5, A + stride, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, B + 1024, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(3, 5, 7);
        A += 1024;
        B += 2048;
    }
    _tile_stored(0, C, kStride);
    _tile_stored(1, C + 16, kStride);
    _tile_stored(2, C + kTileSums, kStride);
    _tile_stored(3, C + kTileSums + 16, kStride);
}

void gemm_one(const int8_t* A, int64_t width, const uint8_t* B, int32_t* C, bool add,
              NextLines next) {
    if (add) {
        _tile_loadd(0, C, kStride);
        _tile_loadd(1, C + 16, kStride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t k = 0; k < width; k += 64) {
        next.fetch();
        _tile_loadd(4, A, 64);
        _tile_loadd(6, B, 64);
        _tile_loadd(7, B + 1024, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        A += 1024;
        B += 2048;
    }
    _tile_stored(0, C, kStride);
    _tile_stored(1, C + 16, kStride);
}

void gemm(const int8_t* A, int64_t stride, int tiles, int, int64_t width, const uint8_t* B,
          int32_t* C, bool add, const uint32_t* next) {
    const int steps = (tiles + 1) / 2;
    const int lines = (kLines + steps - 1) / steps;
    int left = next ? kLines : 0;
    for (; tiles > 0; tiles -= 2) {
        const NextLines here = {next, left < lines ? left : lines};
        left -= here.lines;
        next += width / 64 * here.lines * 16;
        if (tiles > 1) {
            gemm_two(A, stride, width, B, C, add, here);
        } else {
            gemm_one(A, width, B, C, add, here);
        }
        A += 2 * stride;
        C += 2 * kTileSums;
    }
}

}  // namespace bmos::amx

const bmos::Kernels bmos::amx_parts = {
    "amx",   {0, 4, 5, 0, 0}, false,     0,          nullptr,  nullptr, nullptr, nullptr,
    nullptr, nullptr,         nullptr,   amx::gemm,  amx::begin, amx::end, nullptr,
};
