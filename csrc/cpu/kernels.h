// The kernels, as the host code sees them: plain sizes and pointers, and one table of functions an instruction set.
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
  bool shared, isotropic;  // one logvar for all components; and for all dimensions
  const int32_t* place;  // [D]: where dimension d comes in the sum over dimensions; the telling ones come first
  const int64_t* order;  // [K]: the components in the order in which they are taken; null: as they are
  const T* widest;       // [D]: the largest logvar of any component; null where no gradient in z is wanted
};

// A rectangle of the M x K pairs, components in their order: what one task works on.
struct Range {
  int64_t row_begin, row_end, component_begin, component_end;
};

// log p(z) = top + log(total) of the components seen so far; top is near the largest term, or above it.
template <class T>
struct Partial {
  T top;
  double total;
};

constexpr int64_t kMinPanel = 4, kMaxPanel = 32;  // components, with any instruction set and type

// Exponents that forward keeps for backward.  The tile of R rows from the r-th on, and of the panel from the k-th component
// on, is [R, panel] at r * stride + k * R.
template <class T>
struct Exponents {
  T* a;             // [M, stride]; null: none are kept
  uint8_t* matter;  // [M, stride / panel], at a tile's first row: whether it was not left out
  int64_t stride;   // K, by whole panels
};

template <class T>
struct Forward {
  Mixture<T> mixture;
  const T* z;              // [M, D]
  const int64_t* exclude;  // [M]: a place in the order, or -1; or null
  Range range;
  const T* known;       // [rows of the range] or null: a term of the whole sum, or less
  Partial<T>* partial;  // [rows of the range], written
  T* score;             // [rows, D] or null: sum_k exp(a - top) u v, so that the score is -score / total
  Exponents<T> exponents;  // written, if there is no score
  void* scratch;
};

template <class T>
struct Backward {
  Mixture<T> mixture;
  const T* z;
  const int64_t* exclude;
  const T* log_prob;  // [M]
  const T* grad;      // [M]
  Exponents<T> exponents;  // by the same forward; none: computed again
  bool dense;              // touch every tile
  Range range;
  // Null where not asked for.
  T* dz;        // [rows of the range, D], added to
  T* dmu;       // [K, D], written at the components of the range; added to if `add`
  T* dlogvar;   // [K, D], likewise; or [D] if shared, added to
  T* dweights;  // [K], likewise
  bool add;
  void* scratch;
};

// z = mu + sigma eps, for rows [row_begin, row_end) of the S x M samples, of which row r belongs to mu's row r % M.
template <class T>
struct Sample {
  const T* mu;      // [M, D]
  const T* logvar;  // [M, D]
  uint64_t seed;
  int64_t M, D, row_begin, row_end;
  T* z;      // [S * M, D]
  T* log_q;  // [S * M]
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
  bool large;  // nor would these
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
  bool large;
};

template <class T>
struct Kernels {
  void (*mixture_forward)(const Forward<T>&);
  void (*mixture_backward)(const Backward<T>&);
  int64_t (*mixture_scratch)(int64_t D, bool shared);  // bytes, for any of the two
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

// The instruction set to run on: the best that this machine has, or the one that FASTVAE_CPU_ISA names.
// Throws std::runtime_error where the machine lacks it.
const Isa& isa();

}  // namespace fastvae
