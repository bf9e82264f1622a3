// Looks for data races: runs layers on threads of its own, which the thread sanitizer sees through
// (it does not see through an OpenMP runtime that was built without it). csrc/sanitize.sh builds it.
//
// Two callers work at the same time, as the threads of a server may. Every result is compared with
// that of one thread, which must have the same bits.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bmos.h"

namespace {
thread_local int this_thread = 0, team_size = 1;
}

// The three functions of an OpenMP runtime that the library looks for.
extern "C" {
int omp_get_thread_num() { return this_thread; }
int omp_get_num_threads() { return team_size; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    const auto run = [=](int number) {
        this_thread = number;
        team_size = int(threads);
        body(data);
        this_thread = 0;
        team_size = 1;
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, int(i));
    run(0);
    for (std::thread& other : others) other.join();
}
}

namespace {

struct Layer {
    int64_t K, E;
    std::vector<int64_t> shards;
    std::vector<char> packed;
    std::vector<float> s_in, s_out, router, x;
    static constexpr int64_t kVocabulary = 203;  // enough rows for three threads
    std::vector<int8_t> table;
    int64_t N = 0;

    Layer(int64_t K, std::vector<int64_t> sizes, int64_t E, int mode, int64_t M)
        : K(K), E(E), shards(std::move(sizes)) {
        const int64_t S = int64_t(shards.size());
        for (int64_t n : shards) N += n;
        table.resize(kVocabulary * K);
        for (int8_t& number : table) number = int8_t(next());
        std::vector<uint8_t> bits(N * ((K + 7) / 8));
        for (uint8_t& byte : bits) byte = uint8_t(next());
        packed.resize(bmos_packed_bytes(K, shards.data(), S));
        expect(bmos_pack(bits.data(), K, shards.data(), S, E, BMOS_F32, mode, packed.data(), 3));
        for (auto [numbers, size] : {std::pair{&s_in, S * E * K}, {&s_out, E * N},
                                     {&router, S * E * K}, {&x, M * K}}) {
            numbers->resize(size);
            for (float& number : *numbers) number = float(int(next() % 2001) - 1000) / 1000;
        }
    }

    std::vector<float> outputs(int64_t M, int threads) const {
        std::vector<float> y(M * N);
        expect(bmos_linear(x.data(), BMOS_F32, M, K, nullptr, packed.data(), s_in.data(),
                           s_out.data(), router.data(), BMOS_F32, int64_t(shards.size()), E,
                           nullptr, 0, y.data(), N, threads));
        return y;
    }

    // The logits of a vocabulary, of which the rows are divided, and of a router's four.
    std::vector<float> logits(int64_t M, int threads) const {
        std::vector<float> y(M * (kVocabulary + 4));
        float* to = y.data();
        for (int64_t rows : {kVocabulary, int64_t(4)}) {
            expect(bmos_dense(x.data(), BMOS_F32, M, K, table.data(), BMOS_I8, rows, to, threads));
            to += M * rows;
        }
        return y;
    }

    static void expect(int status) {
        if (status == BMOS_OK) return;
        std::fprintf(stderr, "race: %s\n", bmos_status(status));
        std::exit(1);
    }

private:
    uint32_t state = 1;
    uint32_t next() { return (state = state * 1664525 + 1013904223) >> 8; }
};

void check(const char* isa, const Layer& layer, int64_t M) {
    const auto all = [&](int threads) {
        std::vector<float> found = layer.outputs(M, threads), more = layer.logits(M, threads);
        found.insert(found.end(), more.begin(), more.end());
        return found;
    };
    const std::vector<float> one = all(1);
    const auto compare = [&](int threads) {
        const std::vector<float> many = all(threads);
        if (std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0) return;
        std::fprintf(stderr, "race: %s, M=%d: %d threads give other bits\n", isa, int(M), threads);
        std::exit(1);
    };
    std::thread caller(compare, 2);
    compare(3);
    caller.join();
}

}  // namespace

int main() {
    constexpr int64_t kMost = 70;
    std::istringstream names(bmos_isas());
    for (std::string isa; names >> isa;) {
        bmos_use_isa(isa.c_str());
        for (int mode : {BMOS_INT8, BMOS_DEFAULT, BMOS_EXACT}) {
            const Layer plain(1100, {200}, 4, mode, kMost), merged(600, {96, 33}, 3, mode, kMost);
            for (int64_t M : {int64_t(1), int64_t(5), kMost}) {
                check(isa.c_str(), plain, M);
                check(isa.c_str(), merged, M);
            }
        }
        std::printf("%s: no race\n", isa.c_str());
    }
}
