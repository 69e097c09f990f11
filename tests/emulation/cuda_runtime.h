// As much of CUDA as csrc/cuda uses, on the CPU: for the tests, which run the kernels' own source this way.
//
// A block's threads are fibers of one thread of the machine; blocks run one after the other.  A fiber runs until it
// has to wait: at a barrier, for the other lanes of its warp, or at its end.  So a kernel that reads what another
// thread writes without a barrier between them depends on the order in which fibers get their turn, and
// FASTVAE_EMULATION_ORDER=ascending|descending|shuffled sets it: a race shows as different results.
// FASTVAE_EMULATION_SUMS=truncating|exact sets how tensor cores add: see emulated_tensor_cores.h.
// FASTVAE_EMULATION_SHARED=<KiB> sets how much shared memory a block may have: 99 to 227, which is what devices since
// sm_80 have; else 99.
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
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vector_types.h"

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
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t = nullptr) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastvae::cuda {
alignas(16) inline unsigned char shared_memory[227 * 1024];
}  // namespace fastvae::cuda

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

inline size_t shared_limit() {  // of a block, in bytes
  const char* kib = std::getenv("FASTVAE_EMULATION_SHARED");
  const size_t limit = (kib ? std::strtoul(kib, nullptr, 10) : 99) * 1024;
  if (limit < 99 * 1024 || limit > sizeof(fastvae::cuda::shared_memory)) fail("no device has that much shared memory");
  return limit;
}

inline std::set<const void*> asked;  // the kernels that may have more than 48 KiB of it

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = int(emulation::shared_limit());
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) < emulation::shared_limit()) emulation::fail("another thread may be about to launch with more");
  emulation::asked.insert(kernel);
  return cudaSuccess;
}

namespace emulation {

enum class State { ready, at_barrier, at_warp, done };

// Of a warp.
enum class Operation {
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  load_matrices,
  load_transposed,
  multiply_add,
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  Operation warp_operation;  // which one it waits for: lanes must agree
  uint64_t slot[2];          // what it shows its warp, in turn: a lane may be one operation ahead
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
inline size_t shared_bytes = 0;    // of a block, of this launch
inline size_t largest_shared = 0;  // of any launch since somebody asked
inline bool exact_sums = false;    // of the tensor cores, in this launch

inline void Block::enter() {
  (*block.body)();
  if (!block.here().open.empty()) fail("an asynchronous copy was never committed");
  block.here().state = State::done;
}

// The lane shows something and waits until all lanes have done so.  It shows it in one of two places, in turn: then it
// may be one operation ahead of lanes that have not looked yet.  Which one is returned.
template <class Show>
unsigned warp_meet(unsigned mask, Operation operation, const Show& show) {
  if (mask != 0xFFFFFFFFu) fail("only whole warps can exchange");
  Fiber& fiber = block.here();
  const unsigned turn = fiber.turn++ % 2;
  show(turn);
  fiber.warp_operation = operation;
  block.wait(State::at_warp);
  return turn;
}

// Every lane shows its bits and then sees those of all lanes.
template <class See>
auto warp_exchange(unsigned mask, Operation operation, uint64_t bits, const See& see) {
  const unsigned turn = warp_meet(mask, operation, [&](unsigned turn) { block.here().slot[turn] = bits; });
  const unsigned first = block.current / 32 * 32;
  return see([&](unsigned lane) { return block.fibers[first + lane].slot[turn]; }, block.current % 32);
}

// The value of another lane, which `from` names.
template <class T, class From>
T shuffle(unsigned mask, Operation operation, T value, const From& from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(mask, operation, bits, [&](auto of, unsigned lane) { return of(from(lane)); });
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned votes(unsigned mask, Operation operation, bool vote) {
  return warp_exchange(mask, operation, vote, [](auto of, unsigned) {
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) all |= unsigned(of(lane)) << lane;
    return all;
  });
}

inline void run_grid(dim3 grid, dim3 threads, size_t bytes, const std::function<void()>& kernel) {
  if (bytes > shared_limit()) fail("more shared memory than the device has");
  if (threads.x % 32 || threads.x > 1024 || threads.y * threads.z != 1) fail("an odd block size");
  if (!grid.x || !grid.y || grid.y > 65535 || grid.z != 1) fail("an impossible grid");
  ++launches;
  shared_bytes = bytes;
  largest_shared = std::max(largest_shared, bytes);
  const char* sums = std::getenv("FASTVAE_EMULATION_SUMS");
  exact_sums = sums && std::string(sums) == "exact";
  if (sums && !exact_sums && std::string(sums) != "truncating") fail("sums are truncating or exact");
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
      std::memset(fastvae::cuda::shared_memory, 0xFF, bytes);
      blockIdx = dim3(x, y, 0);
      block.run(threads.x, kernel, order);
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.wait(emulation::State::at_barrier); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::warp_meet(mask, emulation::Operation::sync, [](unsigned) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulation::shuffle(mask, emulation::Operation::shuffle, value, [&](unsigned) { return unsigned(from) % 32; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const auto from = [&](unsigned lane) { return lane < by ? lane : lane - by; };
  return emulation::shuffle(mask, emulation::Operation::shuffle_up, value, from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const auto from = [&](unsigned lane) { return lane + by < 32 ? lane + by : lane; };
  return emulation::shuffle(mask, emulation::Operation::shuffle_down, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  const auto from = [&](unsigned lane) { return lane ^ unsigned(with); };
  return emulation::shuffle(mask, emulation::Operation::shuffle_xor, value, from);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::votes(mask, emulation::Operation::ballot, vote);
}
inline int __any_sync(unsigned mask, bool vote) { return emulation::votes(mask, emulation::Operation::any, vote) != 0; }
inline int __all_sync(unsigned mask, bool vote) {
  return emulation::votes(mask, emulation::Operation::all, vote) == 0xFFFFFFFFu;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }

namespace emulation {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Of integers alone: the order of threads is of no consequence to them.
template <class T, class Combine>
T atomically(T* to, const Combine& combine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  const T old = *to;
  *to = combine(old);
  return old;
}

}  // namespace emulation

inline int __float_as_int(float x) { return emulation::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::same_bits<unsigned>(x); }
inline float __int_as_float(int bits) { return emulation::same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulation::same_bits<float>(bits); }

// Caches are not emulated.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

template <class T>
T atomicAdd(T* to, std::common_type_t<T> value) {
  return emulation::atomically(to, [&](T old) { return T(unsigned(old) + unsigned(value)); });
}
template <class T>
T atomicMax(T* to, std::common_type_t<T> value) {
  return emulation::atomically(to, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicOr(T* to, std::common_type_t<T> value) {
  return emulation::atomically(to, [&](T old) { return old | value; });
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  if (config->dynamicSmemBytes > 48 * 1024 && !emulation::asked.count(reinterpret_cast<const void*>(kernel)))
    emulation::fail("a kernel has not asked for that much shared memory");
  const std::tuple<P...> given(arguments...);
  emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, given); });
  return cudaSuccess;
}
