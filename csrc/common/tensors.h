// How the operators' host code reads, allocates and checks tensors, for the CPU and CUDA alike.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#define FASTVAE_REGISTER(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace fastvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// new_empty(like, size).  It calls the C function below new_empty, which does not go through the dispatcher with boxed
// arguments: in a small operator, the allocations would take longer than the work otherwise.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= std::max<int64_t>(size[i], 1)) strides[i] = stride;
  int32_t dtype, device_type, device_index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype, device_type,
                                                  device_index, &handle));
  return Tensor(handle);
}

// The functional layer has checked shapes, dtypes and devices.  These checks guard the operators against a direct call.
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
  STD_TORCH_CHECK(z.dim() == 2 && mu.dim() == 2 && logvar.dim() == 2,
                  "fastvae: want z [M, D], mu [K, D], logvar [K, D]");
  const int64_t K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(z.size(1) == D && K > 0 && D > 0, "fastvae: want z [M, D] and mu [K, D]");
  STD_TORCH_CHECK((logvar.size(0) == K || logvar.size(0) == 1) && logvar.size(1) == D,
                  "fastvae: want logvar [K or 1, D]");
  STD_TORCH_CHECK(!log_weights || log_weights->numel() == K, "fastvae: want log_weights [K]");
  STD_TORCH_CHECK(!exclude || (exclude->scalar_type() == ScalarType::Long && exclude->is_contiguous() &&
                               exclude->numel() == z.size(0)),
                  "fastvae: want contiguous int64 exclude [M]");
}

}  // namespace fastvae
