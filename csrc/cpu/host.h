// What the host side of the CPU operators shares: results, threads, scratch.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>

#include "../common/tensors.h"
#include "kernels.h"

// Where the operators are registered; a build for the tests, which emulates an instruction set, names another place.
#ifndef FASTVAE_CPU_LIBRARY
#define FASTVAE_CPU_LIBRARY fastvae
#endif

namespace fastvae {

// A result on the CPU, not yet written.  A large result is often fresh memory, and the first touch of its pages takes
// as long as the work.  That is why huge pages are asked for.
inline Tensor new_result(const Tensor& like, std::vector<int64_t> size) {
  Tensor t = empty(like, size);
#if defined(__linux__)
  constexpr uintptr_t huge = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (first + huge < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

// f(float(), kernels) or f(double(), kernels), by the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float)
    f(float(), isa().f32);
  else
    f(double(), isa().f64);
}

// Whether this process was forked from another.  OpenMP's threads are not there then, and waiting for them would not
// end.
inline std::atomic<bool> forked{false};
#if !defined(_WIN32)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Runs f(task) for each of n tasks.  A thread takes the next task when it has finished one, so that a busy core does
// not delay the others.  What a task computes does not depend on the thread that runs it.
template <class F>
void run_tasks(int64_t n, const F& f) {
  const int64_t workers = forked ? 1 : std::min<int64_t>(n, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < n; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(task);
  });
}

// Runs f(begin, end) for each piece of 0 .. n.
template <class F>
void run_pieces(int64_t n, int64_t piece, const F& f) {
  run_tasks((n + piece - 1) / piece, [&](int64_t task) { f(task * piece, std::min(n, (task + 1) * piece)); });
}

// Memory of this thread, kept from call to call: fresh pages would cost more than the work of a small problem.
inline void* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (int64_t(memory.size()) < bytes) memory.resize(size_t(bytes));
  return memory.data();
}

}  // namespace fastvae
