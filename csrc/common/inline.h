// How functions are declared that are always inlined, on the CPU and, with CUDA, on the device too.
#pragma once

// The CPU's sources are compiled once for each instruction set.  Of a function in namespace fastvae that is not
// inlined, the linker would keep one copy for all of them.
#ifdef __CUDACC__
#define FASTVAE_INLINE __host__ __device__ __forceinline__
#else
#define FASTVAE_INLINE inline __attribute__((always_inline))
#endif
