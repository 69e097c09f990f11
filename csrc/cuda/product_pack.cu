// Makes the features of rows and components for the product form (product.h).  These kernels do O((M + K) D) work.
#include "../common/skipping.h"
#include "certificate.cuh"
#include "screen.h"
#include "tile.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kMaxExponent = 60;  // of a power of two that scales

// |l| beyond which a row's weights are not made from l, which is rounded by 2^-24 of that: by 2^-14.
constexpr float kDoubtful = 1024.0f;

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// floor(log2 x) of a normal x > 0.
__device__ __forceinline__ int exponent_of(float x) { return (__float_as_int(x) >> 23) - 127; }

// The exponent of log2 x, to the nearest whole number within the limits; 0 where x is no positive finite number.
__device__ __forceinline__ int nearest_exponent(float log2_x) {
  if (!(fabs(log2_x) < INFINITY)) return 0;
  return int(rintf(fminf(fmaxf(log2_x, -float(kMaxExponent)), float(kMaxExponent))));
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  return group_sum(x, 32);
}

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

// A number as an integer of the same order, so that atomics find the largest; the same bits in any order.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits < 0 ? bits ^ 0x7FFFFFFF : bits); }

__device__ __forceinline__ void raise(int* maximum, float x) {
  if (ordered(x) > *static_cast<volatile int*>(maximum)) atomicMax(maximum, ordered(x));
}

// The sums of the survey over some components, in one dimension.  delta is mu less the mean of the first component, so
// that the spread does not cancel; with the weight s = 1 / sigma.
struct SurveySums {
  float max_logvar = Limits<float>::kLowest, s = 0, s_delta = 0, s_delta_squared = 0, logvar = 0, count = 0;
  float min_mu = -Limits<float>::kLowest, max_mu = Limits<float>::kLowest;

  __device__ void add(float mu, float reference, float lv) {
    const float weight = exp(-0.5f * bounded(lv)), delta = mu - reference;
    max_logvar = fmaxf(max_logvar, lv);
    s += weight;
    s_delta += weight * delta;
    s_delta_squared += weight * delta * delta;
    logvar += lv;
    count += 1.0f;
    min_mu = fminf(min_mu, mu), max_mu = fmaxf(max_mu, mu);
  }
  __device__ void merge(const SurveySums& other) {
    max_logvar = fmaxf(max_logvar, other.max_logvar);
    s += other.s, s_delta += other.s_delta, s_delta_squared += other.s_delta_squared;
    logvar += other.logvar, count += other.count;
    min_mu = fminf(min_mu, other.min_mu), max_mu = fmaxf(max_mu, other.max_mu);
  }
};
static_assert(sizeof(SurveySums) == Features::kSurveySums * sizeof(float));

__device__ __forceinline__ float reference_of(const Mixture<float>& mix, int64_t d) {
  const float mu = is_present(mix, 0) ? mix.mu[d] : 0.0f;
  return fabs(mu) < INFINITY ? mu : 0.0f;
}

// Of part blockIdx.x of the components, dimensions from blockIdx.y kThreads on.  `across` threads share the dimensions.
__global__ void __launch_bounds__(kThreads)
    survey_parts(Mixture<float> mix, int across, const int* only_if, SurveySums* partial) {
  if (is_off(only_if)) return;
  SurveySums* shared = reinterpret_cast<SurveySums*>(shared_memory);
  const int64_t begin = mix.K * blockIdx.x / gridDim.x, end = mix.K * (int64_t(blockIdx.x) + 1) / gridDim.x;
  const int groups = kThreads / across, group = int(threadIdx.x) / across;
  const int64_t d = int64_t(blockIdx.y) * kThreads + int(threadIdx.x) % across;
  SurveySums sums;
  if (d < mix.D) {
    const float reference = reference_of(mix, d);
    for (int64_t k = begin + group; k < end; k += groups)
      if (is_present(mix, k)) sums.add(mix.mu[k * mix.D + d], reference, logvar_of(mix, k, d));
  }
  shared[threadIdx.x] = sums;
  __syncthreads();
  if (group != 0 || d >= mix.D) return;
  for (int other = 1; other < groups; ++other) sums.merge(shared[other * across + int(threadIdx.x)]);
  partial[blockIdx.x * mix.D + d] = sums;
}

// The optimal scale of a feature balances its size in rows and components.  Take rows as spread like the components,
// S about their mean, with the typical sigma: then x = z' has the size sqrt(S^2 + sigma^2) and y = mu' v about S v, so
// that the balance is at about 1 / sigma.  x = z'^2 has about sqrt(3) (S^2 + sigma^2), and y about v / 2.
__global__ void __launch_bounds__(kThreads)
    merge_survey(Mixture<float> mix, const SurveySums* partial, Features features) {
  const int64_t d = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const Survey& survey = features.survey;
  if (features.uncertain && d == 0) *features.uncertain = 0;
  if (is_off(features.only_if)) return;
  SurveySums sums;
  if (d < mix.D)
    for (int64_t part = threadIdx.x % 32; part < features.parts; part += 32) sums.merge(partial[part * mix.D + d]);
  sums.max_logvar = warp_max(sums.max_logvar);
  sums.s = warp_sum(sums.s);
  sums.s_delta = warp_sum(sums.s_delta);
  sums.s_delta_squared = warp_sum(sums.s_delta_squared);
  sums.logvar = warp_sum(sums.logvar);
  sums.count = warp_sum(sums.count);
  sums.min_mu = -warp_max(-sums.min_mu);
  sums.max_mu = warp_max(sums.max_mu);
  if (features.signs && d == 0) features.signs[0] = features.signs[1] = 0;
  if (features.sizes && d <= mix.D + 1) features.sizes[d] = 0.0f;
  if (features.maxima && d == 0) features.maxima[0] = features.maxima[1] = ordered(-INFINITY);
  if (d >= mix.D || threadIdx.x % 32 != 0) return;
  const float mean = sums.s_delta / sums.s, variance = sums.s_delta_squared / sums.s - mean * mean;
  const float origin = reference_of(mix, d) + mean, log2_v = -float(kLog2E) * (sums.logvar / sums.count);
  const int unit = nearest_exponent(0.5f * log2_v);
  const float spread = fmaxf(variance, 0.0f) * power_of_two(unit) * power_of_two(unit);  // S^2 / sigma^2
  survey.origin[d] = fabs(origin) < INFINITY ? origin : 0.0f;
  survey.max_mean[d] = fmaxf(fmaxf(sums.max_mu - survey.origin[d], survey.origin[d] - sums.min_mu), 0.0f);
  survey.max_logvar[d] = sums.max_logvar;
  survey.unit[d] = power_of_two(unit);
  survey.square_unit[d] = power_of_two(nearest_exponent(-0.5f * log2f(3.5f * (spread + 1.0f))));
}

// x as two numbers in fp16, whose sum has 22 digits.  Features come in double precision, so that nothing else is rounded:
// v, z' and mu' are the same float32 numbers in all features, in R and in c', as if the inputs had been a rounding off.
__device__ __forceinline__ void store_feature(uint4* lines, int parts, int feature, double x) {
  x = fmin(fmax(x, -65504.0), 65504.0);
  const int per_line = kLineBytes / 2 / parts;
  __half* line = reinterpret_cast<__half*>(lines) + feature / per_line * (kLineBytes / 2);
  const __half hi = __float2half_rn(float(x));
  line[feature % per_line] = hi;
  if (parts == 2) line[per_line + feature % per_line] = __float2half_rn(float(x - double(__half2float(hi))));
}

// From which size on a feature, in the item's own scale, has all its digits: fp16 numbers end at 2^-24.
template <int kParts>
constexpr float kSmallest = kParts == 2 ? 0x1p-3f : 0x1p-14f;

// Stores the features of an item, which value(feature) gives in the common scale, in the item's own; returns the
// exponent of the power of two that undoes that.  A warp does this together.
template <int kParts, class Value>
__device__ __forceinline__ int store_features(uint4* lines, const FeatureShape& shape, const Value& value,
                                              ItemBounds& bounds) {
  const int lane = int(threadIdx.x) % 32, all = shape.lines * kLineFeatures<kParts>;
  float largest = 0, linear = 0, square = 0;
  for (int f = lane; f < all; f += 32) {
    const float x = float(value(f));
    largest = fmaxf(largest, fabs(x));
    (f < shape.width ? linear : square) += x * x;
  }
  // at most the largest number, so that its product with a norm of 0 is 0
  bounds.linear = fminf(sqrtf(warp_sum(linear)), -Limits<float>::kLowest);
  bounds.square = fminf(sqrtf(warp_sum(square)), -Limits<float>::kLowest);
  largest = fminf(warp_max(largest), Limits<float>::kLowest * -1.0f);
  int exponent = largest > 1e-37f ? exponent_of(largest) - 13 : 0;
  if (exponent > kMaxExponent) bounds.linear = bounds.square = -Limits<float>::kLowest;  // some do not fit
  exponent = exponent < -kMaxExponent ? -kMaxExponent : exponent > kMaxExponent ? kMaxExponent : exponent;
  if (largest > 0) {  // smaller ones lose as much as a feature of kSmallest
    const float lost = sqrtf(float(shape.width)) * kSmallest<kParts> * power_of_two(exponent);
    bounds.linear = fminf(bounds.linear + lost, -Limits<float>::kLowest);
    bounds.square = fminf(bounds.square + lost, -Limits<float>::kLowest);
  }
  const float to_own = power_of_two(-exponent);
  for (int f = lane; f < all; f += 32) store_feature(lines, kParts, f, value(f) * to_own);
  return exponent;
}

// Below the limit of a row's exponents, less R, by more than R and the level are rounded; infinite where no exponent counts.
// In units of log 2.
__device__ float screen_level(float log_prob, float limit, float row_term) {
  if (log_prob == -INFINITY) return INFINITY;
  return (limit - row_term) * float(kLog2E) - 0x1p-20f * (fabs(limit) + fabs(row_term)) - 0x1p-8f;
}

// A warp for each row, those of the padding included.
template <int kParts>
__global__ void __launch_bounds__(kThreads) pack_rows(Mixture<float> mix, RowWeights weights, Features features) {
  if (is_off(features.only_if)) return;
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  const FeatureShape& shape = features.shape;
  const Survey& survey = features.survey;
  const float* z = mix.z + m * mix.D;

  double sum = 0;
  for (int64_t d = lane; d < mix.D && m < mix.M; d += 32) {
    const float centred = z[d] - survey.origin[d];
    sum += double(centred) * centred * exp(-bounded(survey.max_logvar[d]));
  }
  const float term = float(-0.5 * warp_sum(sum));  // not finite if a coordinate is not: then the row has no features
  const float log_prob = weights.log_prob && m < mix.M ? weights.log_prob[m] : 0.0f;
  const bool has_features = m < mix.M && fabs(term) < INFINITY && log_prob != -INFINITY;
  const auto value = [&](int feature) {
    const int d = feature < shape.width ? feature : feature - shape.width;
    if (!has_features || d >= mix.D || (feature >= shape.width && !shape.squares)) return 0.0;
    const double scaled = (z[d] - survey.origin[d]) * survey.unit[d];
    return feature < shape.width ? scaled : scaled * scaled * survey.square_unit[d];
  };
  ItemBounds bounds;
  const int exponent = store_features<kParts>(features.rows.lines + m * shape.lines * 8, shape, value, bounds);
  if (lane != 0) return;
  if (features.rows.bounds) {
    // R decides where it is not finite, whatever the pairs are
    bounds.shift = has_features ? allowed_slope(mix.D) * term * float(kLog2E) - 2.0f * kRoundoff * float(kLog2E) * term
                                : -INFINITY;
    features.rows.bounds[m] = bounds;
  }
  if (features.rows.screen) {
    const float l = m < mix.M ? log_prob : -INFINITY, limit = l + log_negligible<float>(mix.K);
    const float max_peak = from_ordered(features.maxima[0]), max_ratio = from_ordered(features.maxima[1]);
    const bool in_range = fabs(l) <= kMaxScreenedLogProb && fabs(term) < INFINITY;
    if (!in_range && l != -INFINITY) *features.uncertain = kGivenUp;
    const float score_limit = limit - log_t_bound(limit, max_peak, max_ratio) - max_ratio;
    features.rows.screen[m] = {screen_level(l, limit, term), power_of_two(exponent), bounds.linear, bounds.square};
    features.score_levels[m] = screen_level(l, score_limit, term);
    return;
  }
  ItemTerms terms = {-INFINITY, power_of_two(exponent), -INFINITY, 0.0f};
  const float upstream = weights.grad && m < mix.M ? weights.grad[m] : 1.0f,
              grad = weights.negated ? -upstream : upstream;
  const bool has_weight = weights.log_prob && m < mix.M && log_prob != -INFINITY && grad != 0.0f;
  const bool doubtful = has_features && has_weight && fabs(log_prob) > kDoubtful;
  if (has_weight) {
    const double log2_density = (double(log_prob) - double(term)) * kLog2E;
    terms.constant = -float(log2_density);
    terms.weighted = log2f(fabs(grad)) + float(exponent);
    if (!doubtful) terms.weighted -= float(log2_density + double(terms.constant));  // what the constant has lost
    terms.inverse_scale = grad < 0.0f ? -power_of_two(-exponent) : power_of_two(-exponent);
  }
  features.rows.terms[m] = terms;
  features.row_term[m] = term;
  features.doubtful[m] = doubtful;
}

// A warp for each component, those of the padding included.  uniform_log_weight is -log K.
template <int kParts>
__global__ void __launch_bounds__(kThreads)
    pack_components(Mixture<float> mix, double uniform_log_weight, Features features) {
  const int64_t k = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  const FeatureShape& shape = features.shape;
  const Survey& survey = features.survey;
  const bool present = is_present(mix, k);
  if (is_off(features.only_if)) return;  // not before: for sm_100a the compiler would spill a register

  float logvar_size = 0, log_sigma_ratio = 0, max_logvar = 0;
  double square_sum = 0;
  CompensatedSum<float> logvar_sum;
  for (int64_t d = lane; d < mix.D && present; d += 32) {
    const float lv = logvar_of(mix, k, d), scaled = (mix.mu[k * mix.D + d] - survey.origin[d]) * survey.unit[d];
    logvar_sum.add(lv);
    logvar_size += fabs(lv);
    max_logvar = fmaxf(max_logvar, lv);
    log_sigma_ratio = fmaxf(log_sigma_ratio, 0.5f * (survey.max_logvar[d] - lv));
    square_sum += double(scaled) * scaled * (exp(-bounded(lv)) / (survey.unit[d] * survey.unit[d]));
  }
  const double log_determinant = warp_sum(total_of(logvar_sum.sum, logvar_sum.compensation));
  logvar_size = warp_sum(logvar_size);
  log_sigma_ratio = warp_max(log_sigma_ratio);
  max_logvar = warp_max(max_logvar);
  const double squares = warp_sum(square_sum);
  const auto value = [&](int feature) {
    const int d = feature < shape.width ? feature : feature - shape.width;
    if (!present || d >= mix.D || (feature >= shape.width && !shape.squares)) return 0.0;
    const float unit = survey.unit[d];
    const double v = exp(-bounded(logvar_of(mix, k, d))) / (unit * unit);
    if (feature < shape.width) return double((mix.mu[k * mix.D + d] - survey.origin[d]) * unit) * v * kLog2E;
    const double v_min = exp(-bounded(survey.max_logvar[d])) / (unit * unit);
    return (v - v_min) * (-0.5 * kLog2E) * (1.0f / survey.square_unit[d]);  // a power of two
  };
  ItemBounds bounds;
  const int exponent = store_features<kParts>(features.components.lines + k * shape.lines * 8, shape, value, bounds);
  if (features.spreads) {
    __half* line = reinterpret_cast<__half*>(features.spreads + k * 8);
    for (int d = lane; d < kLineFeatures<1>; d += 32) {
      double x = 0;
      if (present && d < mix.D) {
        const double mean = mix.mu[k * mix.D + d] - survey.origin[d];
        x = mean * mean * exp(-bounded(logvar_of(mix, k, d))) * kLog2E * power_of_two(-exponent) *
            spread_scale(survey.max_mean[d], survey.unit[d]);
      }
      if (x > 65504.0) *features.uncertain = kGivenUp;  // the bound has no room for that
      line[d] = __float2half_rn(float(x));
    }
  }
  if (lane != 0) return;
  ItemTerms terms = {-INFINITY, 1.0f, -INFINITY, 0.0f};
  bounds.allowed = INFINITY, bounds.shift = -INFINITY;  // of a component that is absent
  ScreenTerms screen = {-INFINITY, 1.0f, 0.0f, 0.0f};
  float peak = -INFINITY;
  if (present) {
    const double log_weight = mix.log_weights ? double(mix.log_weights[k]) : uniform_log_weight;
    const double exact_peak = log_weight - 0.5 * (log_determinant + double(mix.D) * kLog2Pi);
    const float c = float((exact_peak - 0.5 * squares) * kLog2E);
    peak = float(exact_peak);
    terms = {c, power_of_two(exponent), float(exponent), power_of_two(-exponent)};
    const float n = float(mix.D), size = fabs(float(log_weight)) + 0.5f * (logvar_size + n * float(kLog2Pi));
    // Where c' or v is beyond float32, no bound holds.
    const bool in_range = squares < 1e38 && max_logvar <= Limits<float>::kExpLimit;
    const bool fits = !features.sizes || bounds.linear < -Limits<float>::kLowest;  // also into the sums
    if (features.uncertain && !(in_range && fits)) *features.uncertain = kGivenUp;
    bounds.allowed = (kRoundoff * (1.0f + sqrtf(n)) * size + allowed_slope(mix.D) * peak) * float(kLog2E);
    bounds.shift = float(exact_peak * kLog2E);
    screen = {c + 0x1p-21f * (fabs(c) + fabs(peak)), terms.scale, kScreenError * bounds.linear,
              kScreenError * bounds.square};
  }
  if (features.sizes && present) raise(reinterpret_cast<int*>(features.sizes) + mix.D + 1, terms.scale);
  features.components.terms[k] = terms;
  if (features.components.bounds) {
    bounds.linear *= kError * kRoundoff, bounds.square *= kError * kRoundoff;
    features.components.bounds[k] = bounds;
  }
  if (features.components.screen) {
    features.components.screen[k] = screen;
    features.peaks[k] = peak;
    if (present) raise(features.maxima, peak), raise(features.maxima + 1, log_sigma_ratio);
  }
}

// What certified sums need of all rows that have a weight, and which rows rule them out.  Blocks and threads as in
// survey_parts, of part blockIdx.x of the rows.
__global__ void __launch_bounds__(kThreads)
    survey_rows(Mixture<float> mix, RowWeights weights, int across, Features features) {
  if (is_off(features.only_if)) return;
  const int64_t begin = mix.M * blockIdx.x / gridDim.x, end = mix.M * (int64_t(blockIdx.x) + 1) / gridDim.x;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t tile = first; features.repeated.rows && tile * kRepeatedRows < mix.M; tile += threads)
    features.repeated.rows[tile] = 0;
  for (int64_t tile = first; features.repeated.components && tile * kRepeatedComponents < mix.K; tile += threads)
    features.repeated.components[tile] = 0;
  const int64_t d = int64_t(threadIdx.x) % across;
  float size = 0, scale = 0;
  for (int64_t m = begin + int(threadIdx.x) / across; m < end && d < mix.D; m += kThreads / across) {
    const float l = weights.log_prob[m], grad = upstream_gradient(weights.grad, weights.negated, m);
    if (l == -INFINITY) continue;
    const bool fits = features.rows.bounds[m].linear < -Limits<float>::kLowest;  // as in pack_components
    if (!(fabs(l) <= kDoubtful && fabs(grad) < INFINITY && fits)) *features.uncertain = kGivenUp;
    if (grad == 0.0f) continue;
    if (d == 0) features.signs[grad < 0.0f] = 1;
    size = fmaxf(size, fabs(mix.z[m * mix.D + d] - features.survey.origin[d]));
    scale = fmaxf(scale, features.rows.terms[m].scale);
  }
  // numbers that are not negative are in the order of their bits
  if (d < mix.D) atomicMax(reinterpret_cast<int*>(features.sizes) + d, __float_as_int(size));
  if (d == 0) atomicMax(reinterpret_cast<int*>(features.sizes) + mix.D, __float_as_int(scale));
}

}  // namespace

template <int kParts>
void pack_features(const Mixture<float>& mix, const RowWeights& weights, const Features& features, Stream stream) {
  int across = 8;  // threads that share the dimensions of a block
  while (across < kThreads && across < mix.D) across *= 2;
  SurveySums* partial = reinterpret_cast<SurveySums*>(features.partial);
  launch(stream, features.parts, blocks_for(mix.D, kThreads), kThreads, kThreads * sizeof(SurveySums), survey_parts,
         mix, across, features.only_if, partial);
  const int64_t numbers = mix.D + (features.sizes ? 2 : 0);  // that merge_survey writes
  launch(stream, blocks_for(numbers, kThreads / 32), 1, kThreads, 0, merge_survey, mix, partial, features);
  launch(stream, blocks_for(features.components.count, kThreads / 32), 1, kThreads, 0, pack_components<kParts>, mix,
         -std::log(double(mix.K)), features);
  launch(stream, blocks_for(features.rows.count, kThreads / 32), 1, kThreads, 0, pack_rows<kParts>, mix, weights,
         features);
  if (features.sizes)
    launch(stream, Features::survey_parts(mix.M), 1, kThreads, 0, survey_rows, mix, weights, across, features);
}

template void pack_features<1>(const Mixture<float>&, const RowWeights&, const Features&, Stream);
template void pack_features<2>(const Mixture<float>&, const RowWeights&, const Features&, Stream);

}  // namespace fastvae::cuda
