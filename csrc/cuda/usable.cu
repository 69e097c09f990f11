// Whether these kernels can run on a device: its driver may be too old for the runtime that is linked in here, or the
// device for the architectures that the kernels were compiled for.
#include <cuda_runtime.h>

#include "kernels.h"

namespace fastvae::cuda {
namespace {

__global__ void any_kernel() {}

}  // namespace

const char* why_unusable(int device) {
  int before;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, any_kernel);
    cudaSetDevice(before);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // else the next call would report this failure
  return cudaGetErrorString(status);
}

}  // namespace fastvae::cuda
