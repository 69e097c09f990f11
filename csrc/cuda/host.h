// What the host side of the CUDA operators shares.
#pragma once

#include <memory>

#include "../common/tensors.h"
#include "kernels.h"

// Where the operators are registered; a build for the tests, which runs the kernels on the CPU, names another place.
#ifndef FASTVAE_CUDA_LIBRARY
#define FASTVAE_CUDA_LIBRARY fastvae
#define FASTVAE_CUDA_KEY CUDA
#endif

namespace fastvae::cuda {

// Makes a tensor's device the current one for as long as it lives, and knows PyTorch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);
  OnDeviceOf(const OnDeviceOf&) = delete;
  Stream stream() const { return stream_; }

 private:
  std::shared_ptr<void> guard_;
  Stream stream_;
};

// The functional layer checked this; on a GPU a pointer of another device would be an illegal access.
inline void check_devices(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t->device() == first.device(), "fastvae: want all tensors on one device");
}

// The kernel reads it on the device, so that a captured graph draws anew at every replay.
inline const int64_t* seed_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "fastvae: want one int64 seed");
  return input<int64_t>(seed);
}

// f(float()) or f(double()), after the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

}  // namespace fastvae::cuda
