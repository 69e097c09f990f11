// The kernels, as the host code sees them: plain sizes, device pointers, a stream.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fastvae::cuda {

using Stream = CUstream_st*;

// z = mu + sigma eps for S samples of each of M rows; z [S, M, D], log_q [S, M].
template <class T>
struct Sample {
  const T *mu, *logvar;  // [M, D]
  const int64_t* seed;   // [1]
  int64_t S, M, D;
  T *z, *log_q;
};

template <class T>
struct SampleBackward {
  const T* grad_z;      // [S, M, D]
  const T* grad_log_q;  // [S, M]
  const T* logvar;      // [M, D]
  const int64_t* seed;
  bool path_derivative;
  int64_t S, M, D;
  T *dmu, *dlogvar;  // [M, D]
};

// KL to N(0, I), and its gradients.
template <class T>
struct Divergence {
  const T *mu, *logvar;  // [M, D]
  int64_t M, D;
  T* kl;             // [M], or null: gradients are wanted
  const T* grad;     // [M]
  T *dmu, *dlogvar;  // [M, D]
};

template <class T>
void gaussian_rsample(const Sample<T>&, Stream);
template <class T>
void gaussian_rsample_backward(const SampleBackward<T>&, Stream);
template <class T>
void gaussian_kl(const Divergence<T>&, Stream);

}  // namespace fastvae::cuda
