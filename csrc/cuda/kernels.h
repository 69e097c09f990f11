// What the kernels offer to the operators' host code: functions of plain sizes, device pointers and a stream.
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
  const T* grad_z;      // [S, M, D], or null: zero
  const T* grad_log_q;  // [S, M]
  const T* score;       // [S, M, D], of log p: z's gradient then has the part -grad_log_q score; or null
  const T* logvar;      // [M, D]
  const int64_t* seed;
  bool path_derivative;
  int64_t S, M, D;
  T *dmu, *dlogvar;  // [M, D]
};

// KL to N(0, I), or its gradients.
template <class T>
struct GaussianKl {
  const T *mu, *logvar;  // [M, D]
  int64_t M, D;
  T* kl;             // [M], or null: the gradients are wanted
  const T* grad;     // [M]
  T *dmu, *dlogvar;  // [M, D]
};

// M rows and K diagonal Gaussians in D dimensions, row-major.
template <class T>
struct Mixture {
  const T *z, *mu;         // [M, D], [K, D]
  const T* logvar;         // [K, D], or [D] if shared
  const T* log_weights;    // [K], or null: -log K each
  const int64_t* exclude;  // [M], or null
  int64_t M, K, D;
  bool shared;
};

// For mixture_backward.  A gradient that is null is not wanted.
template <class T>
struct Gradients {
  const T* log_prob;  // [M]
  const T* grad;      // [M], or null: all ones
  bool negated;       // it is -grad
  bool dense;         // nothing is left out
  T *dz, *dmu;        // [M, D], [K, D]
  T* dlogvar;         // [K, D], or [D] if shared
  T* dweights;        // [K]
};

template <class T>
void gaussian_rsample(const Sample<T>&, Stream);
template <class T>
void gaussian_rsample_backward(const SampleBackward<T>&, Stream);
template <class T>
void gaussian_kl(const GaussianKl<T>&, Stream);

// How many numbers of scratch memory on the device mixture_forward and mixture_backward need, until the stream is past
// them.
template <class T>
int64_t forward_scratch(const Mixture<T>&);
template <class T>
int64_t backward_scratch(const Mixture<T>&, const Gradients<T>&);

template <class T>
void mixture_forward(const Mixture<T>&, T* scratch, T* log_prob, Stream);
template <class T>
void mixture_backward(const Mixture<T>&, const Gradients<T>&, T* scratch, Stream);

// In the product form (product.h), on tensor cores: kParts = 2 is precision "high", 1 is "medium".  Backward writes
// log_prob as well, unless it is null, where dz is wanted.
template <int kParts>
int64_t product_forward_scratch(const Mixture<float>&);
template <int kParts>
int64_t product_backward_scratch(const Mixture<float>&, const Gradients<float>&);
template <int kParts>
void mixture_product_forward(const Mixture<float>&, float* scratch, float* log_prob, Stream);
template <int kParts>
void mixture_product_backward(const Mixture<float>&, const Gradients<float>&, float* log_prob, float* scratch, Stream);

// Where products are as exact as the difference form; sums of them at most in kMaxCertifiedDimensions.
constexpr int64_t kMaxCertifiedDimensions = 64;

// log p in the product form where that is as exact as the difference form.  `uncertain` is on the device, and not 0
// afterwards where the result does not count.
int64_t certified_forward_scratch(const Mixture<float>&);
void mixture_certified_forward(const Mixture<float>&, int* uncertain, float* scratch, float* log_prob, Stream);

// Of a small problem (is_small in plan.h).  Where `sample` is not null, z is drawn first, into sample->z, which is
// mix.z, and kl = log q - log p.  The score is null where it is not wanted.
template <class T>
struct SmallForward {
  Mixture<T> mix;
  const Sample<T>* sample;
  T *kl, *log_prob, *score;  // [M], [M], [M, D]
};

// Why these kernels cannot run on a device, "" where they can.
const char* why_unusable(int device);

// Each is one launch.
template <class T>
void small_forward(const SmallForward<T>&, Stream);
template <class T>
void small_backward_rows(const Mixture<T>&, const Gradients<T>&, Stream);
template <class T>
void small_backward_components(const Mixture<T>&, const Gradients<T>&, T* dlogvar, Stream);  // [K, D], or null

}  // namespace fastvae::cuda
