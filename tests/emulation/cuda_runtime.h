// As much of CUDA as csrc/cuda uses, on the CPU: for the tests, which run the kernels' own source this way.
//
// A block's threads are fibers of one thread of the machine; blocks run one after the other.  A fiber runs until it
// has to wait: at a barrier, for the other lanes of its warp, or at its end.  So a kernel that reads what another
// thread writes without a barrier between them depends on the order in which fibers get their turn, and
// FASTVAE_EMULATION_ORDER=ascending|descending|shuffled sets it: a race shows as different results.
//
// Asynchronous copies are done as late as they may be, when their group is waited for; shared memory starts as NaN.
#pragma once

#include <math.h>  // and not cmath: fma(float, float, float) has to be found without std::
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastvae::cuda {
constexpr size_t kSharedLimit = 99 * 1024;  // of a block, on the smallest device
alignas(16) inline unsigned char shared_memory[kSharedLimit];
}  // namespace fastvae::cuda

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

enum class State { ready, at_barrier, at_warp, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  unsigned warp_operation;  // which one it waits for: lanes must agree
  uint64_t slot[2];         // what it shows its warp, in turn: a lane may be one operation ahead
  unsigned turn;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Block {
  std::deque<Fiber> fibers;
  ucontext_t scheduler;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;

  Fiber& here() { return fibers[current]; }

  void wait(State state) {
    Fiber& fiber = here();
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler);
  }

  static void enter();

  void run(unsigned threads, const std::function<void()>& kernel, const std::vector<unsigned>& order) {
    body = &kernel;
    while (fibers.size() < threads) fibers.emplace_back().stack.resize(256 * 1024);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.state = State::ready;
      fiber.turn = 0;
      fiber.groups.clear();
      fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
      for (unsigned t : order) {
        if (fibers[t].state != State::ready) continue;
        current = t;
        threadIdx = dim3(t, 0, 0);
        swapcontext(&scheduler, &fibers[t].context);
      }
      const auto count = [&](unsigned begin, unsigned end, State state) {
        unsigned n = 0;
        for (unsigned t = begin; t < end; ++t) n += fibers[t].state == state;
        return n;
      };
      if (count(0, threads, State::done) == threads) return;
      bool moved = false;
      if (count(0, threads, State::at_barrier) == threads) {
        for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::ready;
        continue;
      }
      for (unsigned w = 0; w < threads; w += 32) {
        if (count(w, w + 32, State::at_warp) != 32) continue;
        for (unsigned t = w; t < w + 32; ++t) {
          if (fibers[t].warp_operation != fibers[w].warp_operation) fail("lanes of a warp met at different operations");
          fibers[t].state = State::ready;
        }
        moved = true;
      }
      if (!moved) fail("some threads wait for others that do not come");
    }
  }
};

inline Block block;
inline int64_t launches = 0;       // so far
inline size_t largest_shared = 0;  // bytes of a block, of any launch since somebody asked

inline void Block::enter() {
  (*block.body)();
  if (!block.here().open.empty()) fail("an asynchronous copy was never committed");
  block.here().state = State::done;
}

// Every lane shows its bits and then sees those of all lanes.
template <class See>
auto warp_exchange(unsigned mask, unsigned operation, uint64_t bits, const See& see) {
  if (mask != 0xFFFFFFFFu) fail("only whole warps can exchange");
  Fiber& fiber = block.here();
  const unsigned turn = fiber.turn++ % 2, first = block.current / 32 * 32;
  fiber.slot[turn] = bits;
  fiber.warp_operation = operation;
  block.wait(State::at_warp);
  return see([&](unsigned lane) { return block.fibers[first + lane].slot[turn]; }, block.current % 32);
}

inline void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > fastvae::cuda::kSharedLimit) fail("more shared memory than every device has");
  if (threads.x % 32 || threads.x > 1024 || threads.y * threads.z != 1) fail("an odd block size");
  if (!grid.x || !grid.y || grid.y > 65535 || grid.z != 1) fail("an impossible grid");
  ++launches;
  largest_shared = std::max(largest_shared, shared_bytes);
  gridDim = grid;
  blockDim = threads;
  std::vector<unsigned> order(threads.x);
  for (unsigned t = 0; t < threads.x; ++t) order[t] = t;
  const char* wanted = std::getenv("FASTVAE_EMULATION_ORDER");
  const std::string name = wanted ? wanted : "ascending";
  if (name == "descending") std::reverse(order.begin(), order.end());
  std::mt19937 random(grid.x * 31 + grid.y);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      if (name == "shuffled") std::shuffle(order.begin(), order.end(), random);
      std::memset(fastvae::cuda::shared_memory, 0xFF, shared_bytes);
      blockIdx = dim3(x, y, 0);
      block.run(threads.x, kernel, order);
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.wait(emulation::State::at_barrier); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::warp_exchange(mask, 0, 0, [](auto, unsigned) { return 0; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::warp_exchange(mask, 1, bits, [&](auto of, unsigned lane) { return of(lane ^ unsigned(with)); });
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::warp_exchange(mask, 2, vote, [](auto of, unsigned) {
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) all |= unsigned(of(lane)) << lane;
    return all;
  });
}

inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::tuple<P...> given(arguments...);
  emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, given); });
  return cudaSuccess;
}
