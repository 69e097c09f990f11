// In place of csrc/cuda/device.cpp: the CPU is the device.
#include "host.h"

namespace fastvae::cuda {

OnDeviceOf::OnDeviceOf(const Tensor&) : stream_(nullptr) {}

}  // namespace fastvae::cuda
