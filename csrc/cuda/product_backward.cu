// The score and the gradients in the product form: plans, launches, and what is made of the sums of product_sums.cuh.
//
// With S0 = sum_m w, S1 = sum_m w z' and S2 = sum_m w z'^2 of a component, and G1, G2 the means of the components'
// features under a row's responsibilities, all in the units of z:
//
//   score = G1 + 2 z' G2 - z' v_min      dmu = v (S1 - mu' S0)      dlogvar = 1/2 (v (S2 - 2 mu' S1 + mu'^2 S0) - S0)
#include "../common/skipping.h"
#include "product_sums.cuh"
#include "reductions.cuh"
#include "screen.h"

namespace fastvae::cuda {
namespace {

// The splits of an item's sums, merged: the largest reference, and the factor of each split.
struct Merged {
  float reference = Limits<float>::kLowest, total = 0;

  __device__ Merged(const SumsTask& task, int64_t item) {
    for (int split = 0; split < task.splits; ++split)
      reference = fmaxf(reference, task.reference[split * task.own.count + item]);
    for (int split = 0; split < task.splits; ++split)
      total += factor(task, item, split) * task.total[split * task.own.count + item];
  }
  __device__ float factor(const SumsTask& task, int64_t item, int split) const {
    return exp2_term(task.reference[split * task.own.count + item] - reference);
  }
  __device__ float sum(const SumsTask& task, int64_t item, int feature) const {
    float sum = 0;
    for (int split = 0; split < task.splits; ++split)
      sum += factor(task, item, split) * task.sums[(split * task.own.count + item) * task.columns + feature];
    return sum;
  }
};

__device__ __forceinline__ void store(float* to, int64_t i, int64_t n, int splits, float value) {
  for (int split = 0; split < splits; ++split) to[split * n + i] = split == 0 ? value : 0.0f;
}

// A warp for each row, the score times the upstream gradient: the first of the splits of dz [splits, M, D]; the others
// get 0.  Without log_prob in `weights`, log_prob [M] is written unless it is null.  kCertified: says in `features` which
// rows the difference form has to compute.
template <bool kCertified>
__global__ void __launch_bounds__(kThreads) finish_rows(Mixture<float> mix, Features features, SumsTask task,
                                                        RowWeights weights, float* log_prob, float* dz, int splits) {
  if (kCertified && is_off(features.only_if)) return;
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (m >= mix.M) return;
  const Merged merged(task, m);
  float l;
  if constexpr (kCertified) {
    l = weights.log_prob[m];
  } else {
    l = BinaryLogSum{merged.reference, merged.total}.log(features.row_term[m]);
    if (log_prob && lane == 0) log_prob[m] = l;
  }
  bool certified = !kCertified || !is_given_up(features, true);
  const Survey& survey = features.survey;
  [[maybe_unused]] const SumsCertificate certificate(float(mix.K), float(kOthers<true>), task.splits, float(mix.D), 0);
  const float upstream = upstream_gradient(weights.grad, weights.negated, m),
              per_total = 1.0f / (merged.total * float(kLog2E));
  for (int d = lane; d < mix.D; d += 32) {
    const float centred = mix.z[m * mix.D + d] - survey.origin[d], unit = survey.unit[d];
    const float least_v = exp(-bounded(survey.max_logvar[d])), square = unit * unit * survey.square_unit[d];
    const float s1 = merged.sum(task, m, d) * unit * per_total;
    const float half =
        features.shape.squares ? merged.sum(task, m, features.shape.width + d) * square * per_total : 0.0f;
    float score = s1 + 2.0f * centred * half - centred * least_v;
    if constexpr (kCertified) {
      const float floor = floor_of(float(mix.K), features.sizes[mix.D + 1], merged.total) / float(kLog2E);
      const float max_mean = survey.max_mean[d], spread_unit = 1.0f / spread_scale(max_mean, unit);
      const float s2 = merged.sum(task, m, task.shape.steps * kStep + d) * spread_unit * per_total;
      const ScoreSums sums = {fma(-2.0f, half, least_v), s1, s2, score, 2.0f * floor * square, floor * unit,
                              floor * spread_unit};
      certified &= is_certified(certificate, sums, centred, max_mean);
    } else {
      if (l != l) score = l;  // the features of a row that has NaN are 0
    }
    store(dz, m * mix.D + d, mix.M * mix.D, splits, l == -INFINITY ? 0.0f : upstream * score);
  }
  if (kCertified && l != -INFINITY && !__all_sync(0xFFFFFFFFu, certified) && lane == 0) {
    features.repeated.rows[m / kRepeatedRows] = 1;
    atomicOr(features.uncertain, kSomeRepeated);
  }
}

// The logarithm of a row's density without R, l - R, is rounded as much as l is.  Where l is large, the weights made of it
// would be off by a large factor.  There it is made anew, by the sums, and kept in two parts, of which the constant is as
// near as can be: with it alone a pair must not come out below the limit.
__global__ void __launch_bounds__(kThreads) correct_rows(int64_t M, Features features, SumsTask task) {
  const int64_t m = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (m >= M || task.doubtful[m] == 0.0f) return;
  const Merged merged(task, m);
  ItemTerms& terms = features.rows.terms[m];
  const double log2_density = double(merged.reference) + log2(double(merged.total));
  terms.constant = -float(log2_density);
  terms.weighted -= float(log2_density + double(terms.constant));  // what the constant has lost
}

// Where a component's gradients go: dlogvar is [K, D], also where the components share logvar.
struct ParametersOut {
  float *dmu, *dlogvar, *dweights;
  int splits = 1;  // of each; all but the first get 0
};

// A warp for each component.  kCertified: says in `features` which components the difference form has to compute.
template <bool kCertified>
__global__ void __launch_bounds__(kThreads)
    finish_components(Mixture<float> mix, Features features, SumsTask task, ParametersOut out) {
  if (kCertified && is_off(features.only_if)) return;
  const int64_t k = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (k >= mix.K) return;
  const Merged merged(task, k);
  // 2^reference times the sums, in two steps: by itself it may be too small for a number, and they too large.
  const float root = exp2(0.5f * merged.reference), s0 = merged.total;
  if (out.dweights && lane == 0) store(out.dweights, k, mix.K, out.splits, s0 * root * root);
  bool certified = !kCertified || (!is_given_up(features, false) && fabs(s0) < INFINITY);
  const bool present = is_present(mix, k);
  const Survey& survey = features.survey;
  [[maybe_unused]] const float rows = float(mix.M), sign = copysignf(1.0f, s0);
  [[maybe_unused]] const float log_weight = mix.log_weights && present ? fabs(mix.log_weights[k]) : 0.0f;
  [[maybe_unused]] const SumsCertificate certificate(rows, float(kOthers<true>), task.splits, float(mix.D), log_weight);
  for (int d = lane; d < mix.D && task.sums; d += 32) {
    const float unit = survey.unit[d], mu = present ? mix.mu[k * mix.D + d] - survey.origin[d] : 0.0f;
    const float v = present ? exp(-bounded(logvar_of(mix, k, d))) : 0.0f;
    const float s1 = merged.sum(task, k, d) / unit, wu = s1 - mu * s0;
    const int64_t to = k * mix.D + d;
    if (out.dmu) store(out.dmu, to, mix.K * mix.D, out.splits, v * wu * root * root);
    if (!kCertified && !out.dlogvar) continue;
    const float square = unit * unit * survey.square_unit[d];
    const float s2 = merged.sum(task, k, features.shape.width + d) / square;
    if (kCertified && s0 != 0.0f) {
      const float floor = floor_of(rows, features.sizes[mix.D], fabs(s0));
      certified &= are_certified(certificate, sign * s0, sign * s1, sign * s2, mu, v, features.sizes[d], floor / unit,
                                 floor / square, out.dlogvar != nullptr);
    }
    if (!out.dlogvar) continue;
    store(out.dlogvar, to, mix.K * mix.D, out.splits, 0.5f * (v * (s2 - mu * s1 - mu * wu) - s0) * root * root);
  }
  if (kCertified && !__all_sync(0xFFFFFFFFu, certified) && lane == 0) {
    features.repeated.components[k / kRepeatedComponents] = 1;
    atomicOr(features.uncertain, kSomeRepeated);
  }
}

// with_sums: false where totals alone are wanted.
SumsTask plan_sums(const Mixture<float>& mix, const Features& features, bool own_are_rows, bool with_sums, bool dense,
                   Scratch<float>& scratch, bool with_spread = false) {
  SumsTask task;
  task.own = own_are_rows ? features.rows : features.components;
  task.other = own_are_rows ? features.components : features.rows;
  task.shape = features.shape;
  task.others = own_are_rows ? mix.K : mix.M;
  task.exclude = mix.exclude;
  task.M = mix.M;
  task.limit = own_are_rows || dense ? -INFINITY : log_negligible<float>(mix.K) * float(kLog2E);
  // So many pairs of so small a weight are together less than a quarter of a rounding of the largest one.
  task.negligible = dense ? INFINITY : 26.0f + std::log2(float(std::max<int64_t>(task.others, 1)));
  task.max_exponent = with_sums ? 15.0f : INFINITY;
  task.doubtful = nullptr;
  const int64_t blocks = task.own.count / kOwnItems;
  task.slices = with_sums ? int(blocks_for(task.shape.steps, kSliceSteps)) : 1;
  task.splits = plan_splits(blocks_for(task.others, kOthers<false>), blocks * task.slices, kMultiprocessors);
  task.columns = task.shape.steps * kStep + (with_spread ? int(round_up(mix.D, kStep)) : 0);
  task.reference = scratch.take(task.splits * task.own.count);
  task.total = scratch.take(task.splits * task.own.count);
  task.sums = scratch.take(with_sums ? task.splits * task.own.count * task.columns : 0);
  return task;
}

template <int kParts, bool kOwnAreRows, bool kCertified = false>
void launch_sums(const Mixture<float>& mix, const Features& features, const SumsTask& task, Stream stream) {
  if constexpr (!kCertified)
    if (task.shape.steps > kMaxSteps) return launch_sliced_sums<kParts, kOwnAreRows>(task, stream);
  launch(stream, task.own.count / kOwnItems, task.splits, kThreads,
         size_t(sums_shared_bytes<kOwnAreRows, kCertified>(task.shape.lines)),
         weighted_sums<kParts, kOwnAreRows, kCertified>, task, mix, features);
}

template <int kParts>
struct RowsPlan {
  Scratch<float> scratch;
  Features features;
  SumsTask task;

  RowsPlan(const Mixture<float>& mix, bool dense, float* memory) : scratch(memory) {
    features = Features::plan<kParts>(mix, !mix.shared, Bounds::none, scratch);
    task = plan_sums(mix, features, true, true, dense, scratch);
  }
};

template <int kParts>
struct ParametersPlan {
  Scratch<float> scratch;
  Features features;
  SumsTask task, doubtful_rows;
  float* dlogvar = nullptr;  // [K, D], where its sum over the components is wanted
  float* columns = nullptr;  // scratch memory of sum_columns

  ParametersPlan(const Mixture<float>& mix, const Gradients<float>& wanted, float* memory) : scratch(memory) {
    features = Features::plan<kParts>(mix, !mix.shared || wanted.dlogvar, Bounds::none, scratch);
    task = plan_sums(mix, features, false, wanted.dmu || wanted.dlogvar, wanted.dense, scratch);
    doubtful_rows = plan_sums(mix, features, true, false, true, scratch);
    doubtful_rows.doubtful = features.doubtful;
    if (!mix.shared || !wanted.dlogvar) return;
    dlogvar = scratch.take(mix.K * mix.D);
    columns = scratch.take(columns_scratch(mix.K, mix.D));
  }
};

struct CertifiedPlan {
  Scratch<float> scratch;
  Features features;
  SumsTask rows, components;

  CertifiedPlan(const Mixture<float>& mix, const Gradients<float>& wanted, float* memory) : scratch(memory) {
    const bool with_sums = wanted.dmu || wanted.dlogvar;  // which need those of squares to be certified
    features = Features::plan<2>(mix, !mix.shared || with_sums, Bounds::certified_sums, scratch);
    if (wanted.dz) {
      features.spreads = reinterpret_cast<uint4*>(scratch.take(features.components.count * (kLineBytes / 4)));
      rows = plan_sums(mix, features, true, true, wanted.dense, scratch, true);
    }
    if (has_parameters(wanted)) components = plan_sums(mix, features, false, with_sums, wanted.dense, scratch);
  }
};

}  // namespace

// The gradient in z and those of the parameters are made one after the other in the same memory.
template <int kParts>
int64_t product_backward_scratch(const Mixture<float>& mix, const Gradients<float>& wanted) {
  const int64_t rows = wanted.dz ? RowsPlan<kParts>(mix, wanted.dense, nullptr).scratch.size() : 0;
  return std::max(rows, ParametersPlan<kParts>(mix, wanted, nullptr).scratch.size());
}

template <int kParts>
void mixture_product_backward(const Mixture<float>& mix, const Gradients<float>& wanted, float* log_prob,
                              float* scratch, Stream stream) {
  if (wanted.dz) {
    const RowsPlan<kParts> plan(mix, wanted.dense, scratch);
    pack_features<kParts>(mix, {}, plan.features, stream);
    launch_sums<kParts, true>(mix, plan.features, plan.task, stream);
    launch(stream, blocks_for(mix.M, kThreads / 32), 1, kThreads, 0, finish_rows<false>, mix, plan.features, plan.task,
           RowWeights{nullptr, wanted.grad, wanted.negated}, log_prob, wanted.dz, 1);
  }
  if (!has_parameters(wanted)) return;
  const ParametersPlan<kParts> plan(mix, wanted, scratch);
  const Features& features = plan.features;
  pack_features<kParts>(mix, {wanted.log_prob, wanted.grad, wanted.negated}, features, stream);
  launch_sums<kParts, true>(mix, features, plan.doubtful_rows, stream);
  launch(stream, blocks_for(mix.M, kThreads), 1, kThreads, 0, correct_rows, mix.M, features, plan.doubtful_rows);
  launch_sums<kParts, false>(mix, features, plan.task, stream);
  launch(stream, blocks_for(mix.K, kThreads / 32), 1, kThreads, 0, finish_components<false>, mix, features, plan.task,
         ParametersOut{wanted.dmu, plan.dlogvar ? plan.dlogvar : wanted.dlogvar, wanted.dweights});
  if (plan.dlogvar) sum_columns(plan.dlogvar, mix.K, mix.D, plan.columns, wanted.dlogvar, stream);
}

int64_t certified_backward_scratch(const Mixture<float>& mix, const Gradients<float>& wanted) {
  return CertifiedPlan(mix, wanted, nullptr).scratch.size();
}

void mixture_certified_backward(const Mixture<float>& mix, const Gradients<float>& wanted, const SplitSums& to,
                                const int* only_if, int* uncertain, Repeated repeated, float* scratch, Stream stream) {
  const CertifiedPlan plan(mix, wanted, scratch);
  Features features = plan.features;
  features.only_if = only_if, features.uncertain = uncertain, features.repeated = repeated;
  const RowWeights weights = {wanted.log_prob, wanted.grad, wanted.negated};
  pack_features<2>(mix, weights, features, stream);
  if (wanted.dz) {
    launch_sums<2, true, true>(mix, features, plan.rows, stream);
    launch(stream, blocks_for(mix.M, kThreads / 32), 1, kThreads, 0, finish_rows<true>, mix, features, plan.rows,
           weights, static_cast<float*>(nullptr), to.dz, to.splits_z);
  }
  if (!has_parameters(wanted)) return;
  launch_sums<2, false, true>(mix, features, plan.components, stream);
  launch(stream, blocks_for(mix.K, kThreads / 32), 1, kThreads, 0, finish_components<true>, mix, features,
         plan.components, ParametersOut{to.dmu, to.dlogvar, to.dweights, to.splits_parameters});
}

template int64_t product_backward_scratch<1>(const Mixture<float>&, const Gradients<float>&);
template int64_t product_backward_scratch<2>(const Mixture<float>&, const Gradients<float>&);
template void mixture_product_backward<1>(const Mixture<float>&, const Gradients<float>&, float*, float*, Stream);
template void mixture_product_backward<2>(const Mixture<float>&, const Gradients<float>&, float*, float*, Stream);

}  // namespace fastvae::cuda
