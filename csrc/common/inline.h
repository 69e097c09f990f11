// Functions that the CPU's and CUDA's sources share.
#pragma once

// Inlined always: the CPU's sources are compiled once for each instruction set, and the linker would keep one copy for
// all of them.
#ifdef __CUDACC__
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif
