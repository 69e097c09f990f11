// In place of csrc/cuda/device.cpp: the CPU is the device.
#include <cuda_runtime.h>
#include <emulated_tensor_cores.h>

#include <utility>

#include "host.h"

namespace fastvae::cuda {

OnDeviceOf::OnDeviceOf(const Tensor&) : stream_(nullptr) {}

}  // namespace fastvae::cuda

extern "C" int64_t emulated_launches() { return emulation::launches; }
extern "C" int64_t emulated_largest_shared() { return int64_t(std::exchange(emulation::largest_shared, 0)); }
extern "C" int64_t emulated_matrix_bank_conflicts() { return emulation::matrix_bank_conflicts; }
