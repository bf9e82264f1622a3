#include "torch_op.h"

#include <algorithm>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

namespace {

constexpr int32_t kCpu = 0;  // c10::DeviceType

BmosTorch torch;

// The arguments of vllm_bmos::cpu_linear, in their order.
enum Argument { X, LOGITS, WEIGHT, S_IN, S_OUT, ROUTER, BIAS };

BmosHandle handle(BmosValue value) { return reinterpret_cast<BmosHandle>(value); }

// An optional argument is a pointer to a value, or null.
BmosHandle optional(BmosValue value) {
    const auto* inner = reinterpret_cast<BmosValue*>(value);
    return inner ? handle(*inner) : nullptr;
}

// torch makes the first a Python ValueError, the second a RuntimeError.
void check_argument(bool good, const char* what) {
    if (!good) throw std::invalid_argument(std::string("vllm_bmos::cpu_linear: ") + what);
}
void check_call(int status) {
    if (status) throw std::runtime_error("vllm_bmos::cpu_linear: torch's C interface failed");
}

// c10::ScalarType to BmosDtype; -1 for the others.
int bmos_dtype(int32_t dtype) {
    return dtype == 6 ? BMOS_F32 : dtype == 5 ? BMOS_F16 : dtype == 15 ? BMOS_BF16 : -1;
}

struct Tensor {
    void* data = nullptr;
    int64_t dims = 0, *sizes = nullptr;
    int32_t torch_dtype = 0;
    int dtype = 0;

    explicit Tensor(BmosHandle tensor) {
        if (!tensor) return;
        bool contiguous = false;
        check_call(torch.data_ptr(tensor, &data));
        check_call(torch.dims(tensor, &dims));
        check_call(torch.sizes(tensor, &sizes));
        check_call(torch.dtype(tensor, &torch_dtype));
        check_call(torch.is_contiguous(tensor, &contiguous));
        check_argument(contiguous, "all tensors must be contiguous");
        dtype = bmos_dtype(torch_dtype);
    }

    bool is(std::initializer_list<int64_t> shape) const {
        return dims == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), sizes);
    }
};

// The callee owns its arguments.
struct Arguments {
    BmosValue* stack;

    explicit Arguments(BmosValue* stack) : stack(stack) {}
    Arguments(const Arguments&) = delete;
    ~Arguments() {
        for (int i : {X, WEIGHT, S_IN, S_OUT, ROUTER}) torch.delete_tensor(handle(stack[i]));
        for (int i : {LOGITS, BIAS}) {
            if (!stack[i]) continue;
            torch.delete_tensor(optional(stack[i]));
            ::operator delete(handle(stack[i]));
        }
    }
};

}  // namespace

void bmos_torch_use(const BmosTorch* functions) { torch = *functions; }

void bmos_torch_linear(BmosValue* stack, uint64_t, uint64_t) {
    BmosHandle y = nullptr;
    {
        const Arguments arguments(stack);
        const Tensor x(handle(stack[X])), logits(optional(stack[LOGITS])),
            weight(handle(stack[WEIGHT])), s_in(handle(stack[S_IN])), s_out(handle(stack[S_OUT])),
            router(handle(stack[ROUTER])), bias(optional(stack[BIAS]));
        check_argument(x.dims == 2 && s_in.dims == 3 && s_out.dims == 2,
                       "expected x[M, K], in_channel_scale[S, E, K], out_channel_scale[E, N]");
        check_argument(x.dtype >= 0 && bias.dtype >= 0,
                       "x and bias must be float32, float16 or bfloat16");
        check_argument(logits.dtype == BMOS_F32, "logits must be float32");
        uint32_t threads = 1;
        check_call(torch.num_threads(&threads));
        const int64_t M = x.sizes[0], K = x.sizes[1], N = s_out.sizes[1];
        const int64_t S = s_in.sizes[0], E = s_in.sizes[1];
        check_argument(s_in.is({S, E, K}) && router.is({S, E, K}) && s_out.is({E, N}) &&
                           (!logits.data || logits.is({M, S, E})) && (!bias.data || bias.is({N})) &&
                           s_in.dtype == router.dtype && s_in.dtype == s_out.dtype,
                       bmos_status(BMOS_SHAPE));
        const int64_t sizes[] = {M, N}, strides[] = {N, 1};
        check_call(torch.empty_strided(2, sizes, strides, x.torch_dtype, kCpu, 0, &y));
        const Tensor out(y);
        const int status = bmos_linear(
            x.data, x.dtype, M, K, static_cast<float*>(logits.data), weight.data, s_in.data,
            s_out.data, router.data, s_in.dtype, S, E, bias.data, bias.dtype, out.data, N,
            int(threads));
        if (status) torch.delete_tensor(y);
        check_argument(status == BMOS_OK, bmos_status(status));
    }
    stack[0] = reinterpret_cast<BmosValue>(y);
}
