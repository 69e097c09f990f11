// The current device and stream, through LibTorch's stable ABI.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "host.h"

namespace fastvae::cuda {
namespace {

// PyTorch's current stream.  The function that knows it is part of libtorch_cuda, which a CPU build of PyTorch lacks.
// If it were bound when the extension is loaded, the CPU kernels could not be loaded there either.  So it is looked up
// here: where a tensor is on a GPU, libtorch_cuda is loaded.
Stream current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function, "fastvae: this PyTorch has no libtorch_cuda; the CUDA kernels need one built with CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& tensor)
    : guard_(std::make_shared<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index())) {
  // The CUDA runtime that is linked into this extension has a current device of its own.
  const cudaError_t status = cudaSetDevice(tensor.get_device_index());
  STD_TORCH_CHECK(status == cudaSuccess, "fastvae: CUDA: ", cudaGetErrorString(status));
  stream_ = current_stream(tensor.get_device_index());
}

std::string cuda_unusable(int64_t device) { return why_unusable(int(device)); }

FASTVAE_REGISTER(FASTVAE_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_unusable", TORCH_BOX(&cuda_unusable));
}

}  // namespace fastvae::cuda
