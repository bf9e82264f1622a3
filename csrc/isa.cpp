// Which instruction sets this library has, which of them this machine runs, and which is in use.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "layer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bmos {
namespace {

#if defined(__x86_64__)
struct Cpu {
    bool avx2 = false, avx512 = false, amx = false;

    Cpu() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool os_saves = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
        unsigned leaf7_b, leaf7_c, leaf7_d;
        if (!os_saves || !__get_cpuid_count(7, 0, &a, &leaf7_b, &leaf7_c, &leaf7_d)) return;
        // The registers whose contents the operating system keeps across context switches.
        unsigned saved, high;
        asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        const auto has = [](unsigned bits, unsigned all) { return (bits & all) == all; };
        avx2 = has(saved, 0x6) && fma && f16c && has(leaf7_b, 1u << 5);
        // F, DQ, BW and VL; VBMI and VNNI.
        avx512 = avx2 && has(saved, 0xe6) &&
                 has(leaf7_b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) &&
                 has(leaf7_c, 1u << 1 | 1u << 11);
        // TILE and INT8; Linux gives a process the tiles' registers when it asks for them.
        amx = avx512 && has(saved, 0x60000) && has(leaf7_d, 1u << 24 | 1u << 25) && may_use_tiles();
    }

private:
    static bool may_use_tiles() {
#if defined(__linux__)
        constexpr long request_permission = 0x1023, tile_data = 18;
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
        return false;
#endif
    }
};
#endif

const std::vector<Kernels>& usable() {
    static const std::vector<Kernels> found = [] {
        std::vector<Kernels> list;
#if defined(__x86_64__)
        [[maybe_unused]] const Cpu cpu;
#if defined(BMOS_AMX) && defined(BMOS_AVX512)
        if (cpu.amx) {
            Kernels amx = avx512_kernels;
            amx.name = amx_parts.name;
            std::copy_n(amx_parts.max_table_tokens, 5, amx.max_table_tokens);
            amx.gemm = amx_parts.gemm;
            amx.begin = amx_parts.begin;
            amx.end = amx_parts.end;
            list.push_back(amx);
        }
#endif
#ifdef BMOS_AVX512
        if (cpu.avx512) list.push_back(avx512_kernels);
#endif
#ifdef BMOS_AVX2
        if (cpu.avx2) list.push_back(avx2_kernels);
#endif
#endif
        list.push_back(portable_kernels);
        return list;
    }();
    return found;
}

const Kernels*& in_use() {
    static const Kernels* kernels = &usable().front();
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *in_use(); }

}  // namespace bmos

const char* bmos_isas() {
    static const std::string names = [] {
        std::string list;
        for (const auto& kernels : bmos::usable()) {
            list += (list.empty() ? "" : " ") + std::string(kernels.name);
        }
        return list;
    }();
    return names.c_str();
}

const char* bmos_isa() { return bmos::kernels().name; }

int bmos_use_isa(const char* name) {
    for (const auto& kernels : bmos::usable()) {
        if (std::strcmp(kernels.name, name) == 0) {
            bmos::in_use() = &kernels;
            return 0;
        }
    }
    return 1;
}
