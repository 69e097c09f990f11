// Launches a kernel, and checks that the launch succeeded.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastvae::cuda {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would else report as its own
  throw std::runtime_error(std::string("fastvae: CUDA: ") + cudaGetErrorString(status));
}

inline constexpr int64_t blocks_for(int64_t n, int64_t each) { return (n + each - 1) / each; }

// How much shared memory a block may have on this device.
inline int largest_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// kernel<<<{x, y}, threads, shared_bytes, stream>>>(arguments...); does nothing where there are no blocks.
template <class... Parameters, class... Arguments>
void launch(Stream stream, int64_t x, int64_t y, int threads, size_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (x == 0 || y == 0) return;
  if (x > 0x7FFFFFFF || y > 0xFFFF) throw std::runtime_error("fastvae: CUDA: too large for one launch");
  // A kernel must ask for more than 48 KiB.  It asks for all there is, and not for what this launch needs: that could be
  // less than another thread has just asked for, whose launch would then fail.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               largest_shared_bytes()));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(x), unsigned(y));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Whether a kernel has nothing to do: see Packed.
__device__ __forceinline__ bool is_off(const int* only_if) { return only_if && *only_if == 0; }

}  // namespace fastvae::cuda
