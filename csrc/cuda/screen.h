// Which pairs backward computes where few count: a bound on the exponent, pair by pair, from one product in fp16.
//
// With norms |.| over features as in certificate.cuh, the product of the features' high parts is off by at most
//
//   kScreenError (|x1| |y1| + |x2| |y2|)
//
// because a rounding to 11 digits takes 2^-11 of each feature, and 2 % more is far above what sums in float32 lose.  A pair
// whose exponent is below its row's limit by more than that is left out.  All others are computed in the difference form,
// so that nothing but what the skipping rule (common/skipping.h) allows is left out, and nothing else is inexact.
//
// R and c' are rounded too: the limit is lower, and c' higher, than what their roundings could be.
#pragma once

#include "kernels.h"
#include "product.h"

namespace fastvae::cuda {

constexpr float kScreenError = 1.02f * 0x1p-10f;

// With more dimensions a block's sums would not fit into shared memory.
constexpr int64_t kMaxScreenDimensions = 64;

// Gradients of rows whose |l| is larger are made by the kernels for all pairs: these add up a in the order of forward, so
// that its rounding is in a and l alike.
constexpr float kMaxScreenedLogProb = 2048.0f;

// Whether backward screens the pairs first.  That takes about 20 microseconds to find out, and the difference form 50 for
// 2^27 multiply-adds.  FASTVAE_SCREEN=0 tries it never, and 1 always: for the tests.
template <class T>
bool is_screen_tried(const Mixture<T>& mix, const Gradients<T>& wanted) {
  if (sizeof(T) != 4 || wanted.dense || mix.D > kMaxScreenDimensions) return false;
  if (const char* asked = std::getenv("FASTVAE_SCREEN")) return asked[0] == '1';
  return mix.M >= 256 && double(mix.M) * double(mix.K) * double(mix.D) >= double(1 << 27);
}

// Where the sums of the splits go, each [splits, ., D] or [splits, .]; null where they are not wanted.
struct SplitSums {
  float *dz, *dmu, *dlogvar, *dweights;
  int splits_z, splits_parameters;
};

// The gradients that are wanted, in the product form where that is as exact as the difference form (certificate.cuh).
// `uncertain` and `repeated` are on the device: where both are not 0 afterwards, the difference form has to compute these
// tiles.  only_if: see Packed, or null.
int64_t certified_backward_scratch(const Mixture<float>&, const Gradients<float>&);
void mixture_certified_backward(const Mixture<float>&, const Gradients<float>&, const SplitSums&, const int* only_if,
                                int* uncertain, Repeated repeated, float* scratch, Stream);

int64_t screened_backward_scratch(const Mixture<float>&);
// Fills the sums of the gradients that are wanted.  `uncertain` is on the device, and not 0 afterwards where most pairs
// count: then what has been written does not.
void mixture_screened_backward(const Mixture<float>&, const Gradients<float>&, const SplitSums&, int* uncertain,
                               float* scratch, Stream);

}  // namespace fastvae::cuda
