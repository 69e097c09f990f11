// What the host code of the CUDA operators shares: the device guard, checks, and the choice by dtype.
#pragma once

#include <memory>

#include "../common/tensors.h"
#include "kernels.h"

// Where the operators are registered.  The tests' build, which runs the kernels on the CPU, names another library and
// key.
#ifndef FASTVAE_CUDA_LIBRARY
#define FASTVAE_CUDA_LIBRARY fastvae
#define FASTVAE_CUDA_KEY CUDA
#endif

namespace fastvae::cuda {

// While an object of this class lives, the tensor's device is the current one; stream() is PyTorch's current stream
// there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor);
  OnDeviceOf(const OnDeviceOf&) = delete;
  Stream stream() const { return stream_; }

 private:
  std::shared_ptr<void> guard_;
  Stream stream_;
};

// The functional layer has checked the devices.  This guards against a call past it: to a kernel a pointer of another
// device is an illegal access.
inline void check_devices(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t->device() == first.device(), "fastvae: want all tensors on one device");
}

// The kernels read the seed on the device, so that a captured graph draws new numbers at every replay.
inline const int64_t* seed_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "fastvae: want one int64 seed");
  return input<int64_t>(seed);
}

// Calls f(float()) or f(double()), by the dtype of a checked tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float)
    f(float());
  else
    f(double());
}

}  // namespace fastvae::cuda
