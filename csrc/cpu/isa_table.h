// The table of one instruction set; included last by each isa_*.cpp.
#pragma once

#include "gaussian.h"
#include "mixture_backward.h"
#include "mixture_forward.h"

namespace FASTVAE_ISA {

template <class T>
constexpr fastvae::Kernels<T> kKernels = {
    mixture_forward<T>,           mixture_backward<T>, mixture_scratch<T>,      gaussian_rsample<T>,
    gaussian_rsample_backward<T>, gaussian_kl<T>,      gaussian_kl_backward<T>,
};

}  // namespace FASTVAE_ISA
