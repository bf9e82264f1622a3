// The C interface of the CPU kernel: what vllm_bmos/kernels/cpu.py calls through ctypes.
//
// Letters: M tokens, N outputs, K inputs, E experts of one layer with S logical shards.

#pragma once

#include <cstdint>

#define BMOS_API __attribute__((visibility("default")))

extern "C" {

enum BmosDtype { BMOS_F32 = 0, BMOS_F16 = 1, BMOS_BF16 = 2, BMOS_I8 = 3 };

// Planes of eight bits that hold one quantized activation.
enum BmosMode { BMOS_INT8 = 1, BMOS_DEFAULT = 2, BMOS_EXACT = 4 };

enum BmosStatus {
    BMOS_OK = 0,
    BMOS_NOT_PACKED = 1,
    BMOS_SHAPE = 2,
    BMOS_MEMORY = 3,
    BMOS_OTHER_ISA = 4,
};

// Counts the changes of these functions' arguments.
enum { BMOS_ABI = 2 };
BMOS_API int bmos_abi();

// What a status means.
BMOS_API const char* bmos_status(int status);

// The instruction sets that this library has and this machine runs, best first, space-separated.
BMOS_API const char* bmos_isas();

// The one in use.
BMOS_API const char* bmos_isa();

// Use one of them from now on, for weights that are packed from now on: instruction sets differ in
// how they have them. Returns 0, or 1 if the name is not in bmos_isas().
BMOS_API int bmos_use_isa(const char* name);

// Bytes of the packed weights of a layer.
BMOS_API int64_t bmos_packed_bytes(int64_t K, const int64_t* shard_sizes, int64_t S);

// Re-lay bits[N, ceil(K/8)] (the checkpoint's) into `packed` of bmos_packed_bytes(), 8-aligned,
// behind a header that keeps the other arguments for bmos_linear.
BMOS_API int bmos_pack(const uint8_t* bits, int64_t K, const int64_t* shard_sizes, int64_t S,
                       int64_t E, int scale_dtype, int mode, void* packed, int threads);

// y[M, rows] = x[M, K] @ weight[rows, K].T in fp32; the weight alone may be BMOS_I8.
BMOS_API int bmos_dense(const void* x, int x_dtype, int64_t M, int64_t K, const void* weight,
                        int weight_dtype, int64_t rows, float* y, int threads);

// y[M, N] of the whole layer; `logits` [M, S, E] and `bias` [N] may be null. The scales
// s_in[S, E, K], s_out[E, N] and router[S, E, K] have one dtype.
BMOS_API int bmos_linear(const void* x, int x_dtype, int64_t M, int64_t K, const float* logits,
                         const void* packed, const void* s_in, const void* s_out,
                         const void* router, int scale_dtype, int64_t S, int64_t E,
                         const void* bias, int bias_dtype, void* y, int64_t N, int threads);
}
