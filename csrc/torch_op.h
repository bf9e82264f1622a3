// The layer as a kernel of torch's dispatcher, so that no Python runs in a call.
//
// torch's C interface for extensions is stable from 2.10 on. Its functions are handed over by
// vllm_bmos/kernels/torch_op.py, so that neither headers nor libraries of torch are needed to build.

#pragma once

#include "bmos.h"

extern "C" {

// A tensor of torch's, and a value of an operator's stack that holds one.
typedef void* BmosHandle;
typedef uint64_t BmosValue;

// Functions of torch (stable/c/shim.h and aoti_torch/c/shim.h); each returns 0 if it worked.
struct BmosTorch {
    int (*data_ptr)(BmosHandle tensor, void** out);
    int (*dims)(BmosHandle tensor, int64_t* out);
    int (*sizes)(BmosHandle tensor, int64_t** out);
    int (*dtype)(BmosHandle tensor, int32_t* out);
    int (*is_contiguous)(BmosHandle tensor, bool* out);
    int (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                         int32_t device_type, int32_t device_index, BmosHandle* out);
    int (*delete_tensor)(BmosHandle tensor);
    int (*num_threads)(uint32_t* out);
};

// Keep torch's functions for bmos_torch_linear.
BMOS_API void bmos_torch_use(const BmosTorch* functions);

// The kernel of vllm_bmos::cpu_linear: reads the arguments from `stack` and leaves y there.
BMOS_API void bmos_torch_linear(BmosValue* stack, uint64_t arguments, uint64_t results);
}
