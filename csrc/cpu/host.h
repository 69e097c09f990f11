// What the host side of the operators shares: tensors, threads, scratch.
#pragma once

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

// Where the operators are registered; a build for the tests, which emulates an instruction set, names another place.
#ifndef FASTVAE_CPU_LIBRARY
#define FASTVAE_CPU_LIBRARY fastvae
#endif
#define FASTVAE_REGISTER(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace fastvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* input(const std::optional<Tensor>& t) {
  return t ? input<T>(*t) : nullptr;
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// new_empty(like, size).  By the C function below it, which does not go through the dispatcher with boxed arguments: for
// a small operator the allocations would else take longer than the work.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= std::max<int64_t>(size[i], 1)) strides[i] = stride;
  int32_t dtype, device_type, device_index;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// A result on the CPU, not yet written.  A large one is often fresh memory, and the first touch of its pages then takes
// as long as the work; so it asks for huge ones.
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

// The functional layer checked shapes, dtypes and devices; this guards the operators against a call past it.
inline void check_floats(std::initializer_list<const Tensor*> tensors) {
  const ScalarType dtype = (*tensors.begin())->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "fastvae: want float32 or float64");
  for (const Tensor* t : tensors)
    STD_TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous(), "fastvae: want contiguous tensors of one dtype");
}

inline void check_pair(const Tensor& mu, const Tensor& logvar) {
  check_floats({&mu, &logvar});
  STD_TORCH_CHECK(mu.dim() == 2 && logvar.dim() == 2 && mu.size(0) == logvar.size(0) && mu.size(1) == logvar.size(1) &&
                      mu.size(1) > 0,
                  "fastvae: want mu and logvar [M, D]");
}

inline void check_mixture(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                          const std::optional<Tensor>& log_weights, const std::optional<Tensor>& exclude) {
  check_floats({&z, &mu, &logvar, log_weights ? &*log_weights : &z});
  STD_TORCH_CHECK(z.dim() == 2 && mu.dim() == 2 && logvar.dim() == 2, "fastvae: want z [M, D], mu [K, D], logvar [K, D]");
  const int64_t K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(z.size(1) == D && K > 0 && D > 0, "fastvae: want z [M, D] and mu [K, D]");
  STD_TORCH_CHECK((logvar.size(0) == K || logvar.size(0) == 1) && logvar.size(1) == D, "fastvae: want logvar [K or 1, D]");
  STD_TORCH_CHECK(!log_weights || log_weights->numel() == K, "fastvae: want log_weights [K]");
  STD_TORCH_CHECK(!exclude || (exclude->scalar_type() == ScalarType::Long && exclude->is_contiguous() &&
                               exclude->numel() == z.size(0)),
                  "fastvae: want contiguous int64 exclude [M]");
}

// f.operator()<float>(kernels) or <double>, after the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float)
    f(float(), isa().f32);
  else
    f(double(), isa().f64);
}

// Whether this process was forked off another: OpenMP's threads are then not there, and waiting for them would not end.
inline std::atomic<bool> forked{false};
#if !defined(_WIN32)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Runs f(task) for each of n tasks.  Threads take the next one when they are done with the last, so that a busy core
// delays nobody; what a task computes does not depend on who runs it.
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

// Memory of this thread, kept from call to call: fresh pages would cost more than a small problem does.
inline void* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (int64_t(memory.size()) < bytes) memory.resize(size_t(bytes));
  return memory.data();
}

}  // namespace fastvae
