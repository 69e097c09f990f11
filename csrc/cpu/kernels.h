// The kernels as the host code sees them: plain sizes and pointers, and a table of functions for each instruction set.
#pragma once

#include <cstdint>

namespace fastvae {

// K diagonal Gaussians in D dimensions, row-major.
template <class T>
struct Mixture {
  const T* mu;           // [K, D]
  const T* logvar;       // [K, D], or [D] if shared
  const T* log_weights;  // [K], or null: -log K each
  int64_t K, D;
  bool shared, isotropic;   // one logvar for all components; and for all dimensions too
  const int32_t* position;  // [D]: the position of dimension d in the sum over dimensions
  const int64_t* order;     // [K]: order[i] is the i-th component to be taken; null: the i-th is i
  const T* max_logvar;      // [D]: the largest logvar of any component; null where no gradient in z is wanted
};

// What one task works on: a rectangle of the M x K pairs.  Components are counted in the mixture's order.
struct Range {
  int64_t row_begin, row_end, component_begin, component_end;
};

// logsumexp over the components so far: reference + log(total).  The reference is not far below the largest exponent.
template <class T>
struct Partial {
  T reference;
  double total;
};

constexpr int64_t kMinPanel = 4, kMaxPanel = 32;  // components of a panel, over all instruction sets and types

// Exponents that forward keeps for backward.  A tile of R rows from row r on, and of the panel from component k on, is
// an array [R, panel] at a + r * stride + k * R.
template <class T>
struct Exponents {
  T* a;             // [M, stride]; null: none are kept
  uint8_t* active;  // [M, stride / panel]: whether the tile is active, at the tile's first row
  int64_t stride;   // K, rounded up to whole panels of any size
};

template <class T>
struct Forward {
  Mixture<T> mixture;
  const T* z;              // [M, D]
  const int64_t* exclude;  // [M]: the component to leave out, by its index in the order, or -1; or null
  Range range;
  const T* lower_bound;    // [rows of the range] or null: not above l, of the whole mixture
  Partial<T>* partial;     // [rows of the range], written
  T* score;                // [rows, D] or null: sum_k exp(a - reference) u v, so that the score is -score / total
  Exponents<T> exponents;  // written, if there is no score
  void* scratch;
};

template <class T>
struct Backward {
  Mixture<T> mixture;
  const T* z;
  const int64_t* exclude;
  const T* log_prob;       // [M]
  const T* grad;           // [M]
  Exponents<T> exponents;  // those of the same forward; null: they are computed again
  bool dense;              // leave out nothing
  Range range;
  // Null where not asked for.
  T* dz;        // [rows of the range, D], added to
  T* dmu;       // [K, D], written at the components of the range, or added to if `add`
  T* dlogvar;   // [K, D], as dmu; or [D] if shared, always added to
  T* dweights;  // [K], as dmu
  bool add;
  void* scratch;
};

// z = mu + sigma eps, for rows [row_begin, row_end) of the S x M samples.  Row r is a sample of mu's row r % M.
template <class T>
struct Sample {
  const T* mu;      // [M, D]
  const T* logvar;  // [M, D]
  uint64_t seed;
  int64_t M, D, row_begin, row_end;
  T* z;        // [S * M, D]
  T* log_q;    // [S * M]
  bool large;  // z would not stay in the caches
};

// For rows [row_begin, row_end) of M, the sum over the S samples.
template <class T>
struct SampleBackward {
  const T* grad_z;      // [S, M, D]
  const T* grad_log_q;  // [S, M]
  const T* logvar;      // [M, D]
  uint64_t seed;
  bool path_derivative;
  int64_t S, M, D, row_begin, row_end;
  T* dmu;      // [M, D]
  T* dlogvar;  // [M, D]
  bool large;  // dmu and dlogvar would not stay in the caches
};

// For rows [row_begin, row_end) of M.
template <class T>
struct KlBackward {
  const T* grad;    // [M]
  const T* mu;      // [M, D]
  const T* logvar;  // [M, D]
  int64_t D, row_begin, row_end;
  T* dmu;      // [M, D]
  T* dlogvar;  // [M, D]
  bool large;  // dmu and dlogvar would not stay in the caches
};

template <class T>
struct Kernels {
  void (*mixture_forward)(const Forward<T>&);
  void (*mixture_backward)(const Backward<T>&);
  int64_t (*mixture_scratch)(int64_t D, bool shared);  // bytes, enough for both
  void (*gaussian_rsample)(const Sample<T>&);
  void (*gaussian_rsample_backward)(const SampleBackward<T>&);
  void (*gaussian_kl)(const T* mu, const T* logvar, int64_t rows, int64_t D, T* kl);
  void (*gaussian_kl_backward)(const KlBackward<T>&);
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

const Isa& isa_baseline();
#if defined(__x86_64__)
const Isa& isa_avx2();
const Isa& isa_avx512();
#endif

// The instruction set to run on: the one that FASTVAE_CPU_ISA names, else the best that this machine has.
// Throws std::runtime_error where the machine lacks the one that is named.
const Isa& isa();

}  // namespace fastvae
