// Threads and their scratch memory. The threads are those of the OpenMP runtime that torch uses,
// bound to processors as vLLM binds them: the library is not linked with a runtime of its own, and
// these three names, which GNU's, LLVM's and Intel's runtimes all have, are found in the process.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace bmos {

struct Range {
    int64_t first, last;
};

// A thread of a team: its number, and a barrier for all of them.
class Team {
public:
    class Barrier {
        friend class Team;
        std::atomic<int> waiting{0};
        std::atomic<unsigned> round{0};
    };

    explicit Team(Barrier& barrier)
        : barrier_(barrier), thread_(omp_get_thread_num()), threads_(omp_get_num_threads()) {}

    int thread() const { return thread_; }

    // This thread's part of `count` items, in pieces of `step`.
    Range part(int64_t count, int64_t step = 1) const {
        const int64_t pieces = (count + step - 1) / step;
        const auto bound = [&](int64_t thread) {
            const int64_t item = pieces * thread / threads_ * step;
            return item < count ? item : count;
        };
        return {bound(thread_), bound(thread_ + 1)};
    }

    // Spins, because the phases between two barriers last microseconds; yields after a while,
    // because there may be more threads than processors.
    void wait() const {
        if (threads_ == 1) return;
        const unsigned round = barrier_.round.load(std::memory_order_relaxed);
        if (barrier_.waiting.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            barrier_.waiting.store(0, std::memory_order_relaxed);
            barrier_.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; barrier_.round.load(std::memory_order_acquire) == round; ++spins) {
            if (spins > 1000) {
                sched_yield();
            } else {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#elif defined(__aarch64__)
                asm volatile("yield");
#endif
            }
        }
    }

private:
    Barrier& barrier_;
    int thread_, threads_;
};

// Run body(team) on at most `threads` threads.
template <class Body>
void run(int threads, const Body& body) {
    struct Shared {
        const Body& body;
        Team::Barrier barrier;
    } shared = {body, {}};
    const auto start = [](void* data) {
        auto& s = *static_cast<Shared*>(data);
        s.body(Team(s.barrier));
    };
    GOMP_parallel(start, &shared, unsigned(threads), 0);
}

// Hands out pieces of a memory block. Without a block it only counts the bytes.
class Arena {
public:
    explicit Arena(char* memory = nullptr) : memory_(memory) {}

    template <class T>
    T* take(int64_t count) {
        char* start = memory_ ? memory_ + used_ : nullptr;
        used_ += (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
        return reinterpret_cast<T*>(start);
    }
    int64_t used() const { return used_; }

private:
    static constexpr int64_t kLine = 128;  // threads share no cache line, nor a pair of them
    char* memory_;
    int64_t used_ = 0;
};

// Memory that a calling thread keeps from call to call, and that grows as needed.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    // The memory, or null if there is not that much.
    char* reserve(int64_t bytes) {
        if (bytes <= size_) return memory_;
        std::free(memory_);
        size_ = (bytes + kPage - 1) / kPage * kPage;
        memory_ = static_cast<char*>(std::aligned_alloc(kPage, size_));
        if (!memory_) size_ = 0;
        return memory_;
    }
    static Scratch& of_this_thread() {
        static thread_local Scratch scratch;
        return scratch;
    }

private:
    static constexpr int64_t kPage = 4096;
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace bmos
