// The product form of the density, for tensor cores (precision "high" and "medium"): features, layout and plans.
//
// With an origin o near the components, z' = z - o, mu' = mu - o, v = 1 / sigma^2, and in each dimension v_min the
// smallest v of any component, the exponent of a pair is
//
//   a_mk = R_m + c'_k + sum_d [z'_d (mu'_d v_d) - z'_d^2 (v_d - v_min_d) / 2]
//   R_m = -1/2 sum_d z'_d^2 v_min_d      c'_k = c_k - 1/2 sum_d mu'_d^2 v_d
//
// so rows and components have features, x = [z', z'^2] and y = [mu' v, -(v - v_min) / 2], and a = R + c' + x y^T.  Where
// all components share sigma, the squares' features of the components are 0, and forward leaves them out.
//
// Tensor cores take numbers in fp16, with 11 binary digits and a narrow range.  In "high" a feature is the sum of two
// such numbers, hi + lo, and the products hi hi + hi lo + lo hi are added; in "medium" it is hi alone.  For the range,
// features are scaled by powers of two, which are undone exactly: each feature by a power from the components' typical
// sigma, and then each row and each component by one that brings its largest feature to between 2^13 and 2^14.
//
// Exponents are in units of log 2 here: y and c' have the factor log2 e.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"
#include "plan.h"

namespace fastvae::cuda {

// An item is a row or a component.  The features of an item lie in lines of 128 bytes, eight units of 16 bytes: 32
// features with hi in the first four units and lo in the others, or 64 features with hi alone.
constexpr int kLineBytes = 128;
constexpr int kStep = 16;       // features that one instruction of the tensor cores takes
constexpr int kHighPanel = 96;  // components of a panel in product_forward.cu; other panels divide kOwnItems
constexpr int kOwnItems = 128;  // of a block

template <int kParts>  // 2: hi and lo; 1: hi alone
constexpr int kLineFeatures = kLineBytes / 2 / kParts;

struct FeatureShape {
  int width;     // where the squares begin: D rounded up to a multiple of 8
  bool squares;  // whether there are features of squares
  int steps;     // of kStep features
  int lines;     // of an item
};

template <int kParts>
FeatureShape feature_shape(int64_t D, bool squares) {
  const int width = int(round_up(D, 8)), features = int(round_up(squares ? 2 * width : width, kStep));
  return {width, squares, features / kStep, (features + kLineFeatures<kParts> - 1) / kLineFeatures<kParts>};
}

// What a kernel must know of an item beside its features.  scale is the power of two that undoes the item's own.
struct alignas(16) ItemTerms {
  float constant;  // of a component: c'.  Of a row, and the next ones of both: see product_sums.cuh
  float scale;
  float weighted;       // the exponent of scale; a row's has the logarithm of its upstream gradient as well
  float inverse_scale;  // a row's has the sign of its upstream gradient
};

// What all components together decide, [D] each.
struct Survey {
  float *origin, *max_logvar;
  float *unit, *square_unit;  // powers of two: x = [z' unit, (z' unit)^2 square_unit]
  float* max_mean;            // the largest |mu'|
};

// The power of two that brings mu'^2 v, in the scale in which mu' v is a feature, below that feature.
__device__ __forceinline__ float spread_scale(float max_mean, float unit) {
  const int above = (__float_as_int(max_mean * unit) >> 23) - 126;  // max_mean unit is below 2^above
  return __int_as_float((127 - (above < 126 ? above : 126)) << 23);
}

// What the certificate of a pair is made of (certificate.cuh).
struct alignas(16) ItemBounds {
  float linear, square;  // norms of the item's features: of z', or mu' v, and of the squares
  float allowed;         // of a component: what a may be off at its mean, and its slope times c
  float shift;           // of a row: the part of the error that is the row's, and the slope times R; of a component: c
};

// What the screen needs of an item (screen.h).
struct alignas(16) ScreenTerms {
  float level;           // of a component: above c'.  Of a row: below the limit of its exponents, less R
  float scale;           // as in ItemTerms
  float linear, square;  // as in ItemBounds
};

enum class Bounds { none, certificate, certified_sums, screen };

// The bits of Features::uncertain: the difference form has to compute all; or some items.
constexpr int kGivenUp = 1, kSomeRepeated = 2;
constexpr int kRepeatedRows = 128, kRepeatedComponents = 64;  // that it computes together: a tile of backward

// Which tiles of backward the difference form has to compute: not 0 for those.  Null where their gradients are not wanted.
struct Repeated {
  int *rows = nullptr, *components = nullptr;
};

struct Items {
  int64_t count = 0;              // padded to whole blocks and to whole panels
  uint4* lines = nullptr;         // [count, lines], of 8 uint4 each
  ItemTerms* terms = nullptr;     // [count]
  ItemBounds* bounds = nullptr;   // [count], or null
  ScreenTerms* screen = nullptr;  // [count], or null
};

// A component's features and terms; a row's, and R.  Laid out in scratch memory of floats.
struct Features {
  FeatureShape shape;
  Survey survey;
  float* partial;  // of the survey
  int64_t parts;
  Items rows, components;
  float* row_term;  // [rows.count]: R, in nats
  float* doubtful;  // [rows.count]: not 0 where log_prob is too inexact for the row's constant

  int* uncertain = nullptr;  // kGivenUp, kSomeRepeated, or 0; null without bounds

  // For certified sums, else null.
  float* sizes;  // [D + 2]: the largest |z'| of a row that has a weight; the largest scale of a row, of a component
  int* signs;    // [2]: whether a row's upstream gradient is above 0, and below
  uint4* spreads = nullptr;  // [components.count]: a line each, of mu'^2 v in hi alone; where the score is wanted
  Repeated repeated;
  const int* only_if = nullptr;  // see Packed

  // For the screen, else null.
  float* peaks;         // [components.count]: a at the mean, in nats
  int* maxima;          // [2]: the largest peak, and the largest log sigma ratio, as ordered() has them
  float* score_levels;  // [rows.count]: the rows' levels for the gradient in z

  template <int kParts>
  static Features plan(const Mixture<float>& mix, bool squares, Bounds bounds, Scratch<float>& scratch) {
    Features f;
    f.shape = feature_shape<kParts>(mix.D, squares);
    f.parts = survey_parts(mix.K);
    f.survey = {scratch.take(mix.D), scratch.take(mix.D), scratch.take(mix.D), scratch.take(mix.D),
                scratch.take(mix.D)};
    f.partial = scratch.take(f.parts * kSurveySums * mix.D);
    f.rows = items(mix.M, f.shape, scratch);
    f.components = items(mix.K, f.shape, scratch);
    f.row_term = scratch.take(f.rows.count);
    f.doubtful = scratch.take(f.rows.count);
    const auto take = [&](Bounds of, int64_t n) { return bounds == of ? scratch.take(n) : nullptr; };
    for (Items* items : {&f.rows, &f.components}) {
      const bool certified = bounds == Bounds::certificate || bounds == Bounds::certified_sums;
      items->bounds = reinterpret_cast<ItemBounds*>(scratch.take(certified ? items->count * 4 : 0));
      items->screen = reinterpret_cast<ScreenTerms*>(take(Bounds::screen, items->count * 4));
    }
    f.sizes = take(Bounds::certified_sums, mix.D + 2);
    f.signs = reinterpret_cast<int*>(take(Bounds::certified_sums, 2));
    f.peaks = take(Bounds::screen, f.components.count);
    f.maxima = reinterpret_cast<int*>(take(Bounds::screen, 2));
    f.score_levels = take(Bounds::screen, f.rows.count);
    return f;
  }

  static constexpr int kSurveySums = 8;

  // How many parts of the components are surveyed at the same time.
  static int64_t survey_parts(int64_t K) { return std::min<int64_t>((K + 63) / 64, 2 * kMultiprocessors); }

 private:
  static Items items(int64_t n, const FeatureShape& shape, Scratch<float>& scratch) {
    Items items;
    items.count = std::max(round_up(n, kOwnItems), round_up(n, kHighPanel));
    items.lines = reinterpret_cast<uint4*>(scratch.take(items.count * shape.lines * (kLineBytes / 4)));
    items.terms = reinterpret_cast<ItemTerms*>(scratch.take(items.count * 4));
    return items;
  }
};

// For the parameters' gradients.
struct RowWeights {
  const float* log_prob = nullptr;  // [M]; null where only forward is wanted
  const float* grad = nullptr;      // [M], or null: all ones
  bool negated = false;
};

// Fills `features`.
template <int kParts>
void pack_features(const Mixture<float>&, const RowWeights&, const Features&, Stream);

}  // namespace fastvae::cuda
