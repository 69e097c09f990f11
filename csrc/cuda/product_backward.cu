// The score and the gradients in the product form: plans, launches, and what is made of the sums of product_sums.cuh.
//
// With S0 = sum_m w, S1 = sum_m w z' and S2 = sum_m w z'^2 of a component, and G1, G2 the means of the components'
// features under a row's responsibilities, all in the units of z:
//
//   score = G1 + 2 z' G2 - z' v_min      dmu = v (S1 - mu' S0)      dlogvar = 1/2 (v (S2 - 2 mu' S1 + mu'^2 S0) - S0)
#include "product_sums.cuh"
#include "reductions.cuh"

namespace fastvae::cuda {
namespace {

// The splits of an item's sums, merged: the largest exponent, and the factor of each split.
struct Merged {
  float max = Limits<float>::kLowest, total = 0;

  __device__ Merged(const SumsTask& task, int64_t item) {
    for (int split = 0; split < task.splits; ++split) max = fmaxf(max, task.max[split * task.own.count + item]);
    for (int split = 0; split < task.splits; ++split)
      total += factor(task, item, split) * task.total[split * task.own.count + item];
  }
  __device__ float factor(const SumsTask& task, int64_t item, int split) const {
    return exp2_term(task.max[split * task.own.count + item] - max);
  }
  __device__ float sum(const SumsTask& task, int64_t item, int feature) const {
    float sum = 0;
    for (int split = 0; split < task.splits; ++split)
      sum += factor(task, item, split) *
             task.sums[(split * task.own.count + item) * (task.shape.steps * kStep) + feature];
    return sum;
  }
};

// A warp for each row: log_prob [M] unless null, and out [M, D], the score times the upstream gradient.
__global__ void __launch_bounds__(kThreads)
    finish_rows(Mixture<float> mix, Features features, SumsTask task, const float* grad, bool negated, float* log_prob,
                float* out) {
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (m >= mix.M) return;
  const Merged merged(task, m);
  const float term = features.row_term[m];
  const float l = BinaryLogSum{merged.max - kWeightBits, merged.total}.log(term);
  if (log_prob && lane == 0) log_prob[m] = l;
  const Survey& survey = features.survey;
  const float upstream = upstream_gradient(grad, negated, m);
  for (int d = lane; d < mix.D; d += 32) {
    const float centred = mix.z[m * mix.D + d] - survey.origin[d], unit = survey.unit[d];
    float score = merged.sum(task, m, d) * unit;
    if (features.shape.squares)
      score += 2.0f * centred * merged.sum(task, m, features.shape.width + d) * (unit * unit * survey.square_unit[d]);
    score = score / (merged.total * float(kLog2E)) - centred * exp(-bounded(survey.max_logvar[d]));
    out[m * mix.D + d] = l == -INFINITY ? 0.0f : upstream * score;
  }
}

// A warp for each component.  dlogvar is [K, D], also where the components share logvar.
__global__ void __launch_bounds__(kThreads)
    finish_components(Mixture<float> mix, Features features, SumsTask task, float* dmu, float* dlogvar,
                      float* dweights) {
  const int64_t k = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (k >= mix.K) return;
  const Merged merged(task, k);
  const float scale = exp2(merged.max - kWeightBits + features.components.terms[k].constant), s0 = merged.total * scale;
  if (dweights && lane == 0) dweights[k] = s0;
  if (!task.sums) return;
  const bool present = is_present(mix, k);
  const Survey& survey = features.survey;
  for (int d = lane; d < mix.D; d += 32) {
    const float unit = survey.unit[d], mu = present ? mix.mu[k * mix.D + d] - survey.origin[d] : 0.0f;
    const float v = present ? exp(-bounded(mix.logvar[(mix.shared ? 0 : k * mix.D) + d])) : 0.0f;
    const float s1 = merged.sum(task, k, d) * scale / unit, wu = s1 - mu * s0;
    if (dmu) dmu[k * mix.D + d] = v * wu;
    if (!dlogvar) continue;
    const float s2 = merged.sum(task, k, features.shape.width + d) * scale / (unit * unit * survey.square_unit[d]);
    dlogvar[k * mix.D + d] = 0.5f * (v * (s2 - mu * s1 - mu * wu) - s0);
  }
}

template <int kParts>
struct SumsPlan {
  Scratch<float> scratch;
  Features features;
  SumsTask task;
  float* dlogvar = nullptr;  // [K, D], where its sum over the components is wanted
  float* columns = nullptr;  // scratch memory of sum_columns

  SumsPlan(const Mixture<float>& mix, const Gradients<float>& wanted, float* memory) : scratch(memory) {
    const bool rows = wanted.dz;
    features = Features::plan<kParts>(mix, !mix.shared || wanted.dlogvar, scratch);
    task.own = rows ? features.rows : features.components;
    task.other = rows ? features.components : features.rows;
    task.shape = features.shape;
    task.others = rows ? mix.K : mix.M;
    task.exclude = mix.exclude;
    task.M = mix.M;
    task.own_are_rows = rows;
    task.limited = !rows && !wanted.dense;
    task.negligible = wanted.dense ? INFINITY : 26.0f + std::log2(float(std::max<int64_t>(task.others, 1)));
    const int64_t blocks = task.own.count / kOwnItems;
    task.splits = plan_splits(blocks_for(task.others, kOthers), blocks, kMultiprocessors);
    task.max = scratch.take(task.splits * task.own.count);
    task.total = scratch.take(task.splits * task.own.count);
    task.sums = rows || wanted.dmu || wanted.dlogvar
                    ? scratch.take(task.splits * task.own.count * task.shape.steps * kStep)
                    : nullptr;
    if (!mix.shared || !wanted.dlogvar) return;
    dlogvar = scratch.take(mix.K * mix.D);
    columns = scratch.take(columns_scratch(mix.K, mix.D));
  }
};

template <int kParts>
void add_up(const Mixture<float>& mix, const RowWeights& weights, const SumsPlan<kParts>& plan, Stream stream) {
  pack_features<kParts>(mix, weights, plan.features, stream);
  launch(stream, plan.task.own.count / kOwnItems, plan.task.splits, kThreads,
         size_t(sums_shared_bytes<kParts>(plan.features.shape.lines)), weighted_sums<kParts>, plan.task);
}

// The gradients of the parameters alone, and the one in z alone: they are made one after the other in the same memory.
Gradients<float> of_parameters(Gradients<float> wanted) {
  wanted.dz = nullptr;
  return wanted;
}
Gradients<float> of_rows(const Gradients<float>& wanted) {
  return {wanted.log_prob, wanted.grad, wanted.negated, wanted.dense, wanted.dz, nullptr, nullptr, nullptr};
}

}  // namespace

template <int kParts>
int64_t product_backward_scratch(const Mixture<float>& mix, const Gradients<float>& wanted) {
  const int64_t rows = wanted.dz ? SumsPlan<kParts>(mix, of_rows(wanted), nullptr).scratch.size() : 0;
  return std::max(rows, SumsPlan<kParts>(mix, of_parameters(wanted), nullptr).scratch.size());
}

template <int kParts>
void mixture_product_backward(const Mixture<float>& mix, const Gradients<float>& wanted, float* log_prob,
                              float* scratch, Stream stream) {
  if (wanted.dz) {
    const SumsPlan<kParts> plan(mix, of_rows(wanted), scratch);
    add_up<kParts>(mix, {}, plan, stream);
    launch(stream, blocks_for(mix.M, kThreads / 32), 1, kThreads, 0, finish_rows, mix, plan.features, plan.task,
           wanted.grad, wanted.negated, log_prob, wanted.dz);
  }
  if (!wanted.dmu && !wanted.dlogvar && !wanted.dweights) return;
  const SumsPlan<kParts> plan(mix, of_parameters(wanted), scratch);
  add_up<kParts>(mix, {wanted.log_prob, wanted.grad, wanted.negated}, plan, stream);
  launch(stream, blocks_for(mix.K, kThreads / 32), 1, kThreads, 0, finish_components, mix, plan.features, plan.task,
         wanted.dmu, plan.dlogvar ? plan.dlogvar : wanted.dlogvar, wanted.dweights);
  if (plan.dlogvar) sum_columns(plan.dlogvar, mix.K, mix.D, plan.columns, wanted.dlogvar, stream);
}

template int64_t product_backward_scratch<1>(const Mixture<float>&, const Gradients<float>&);
template int64_t product_backward_scratch<2>(const Mixture<float>&, const Gradients<float>&);
template void mixture_product_backward<1>(const Mixture<float>&, const Gradients<float>&, float*, float*, Stream);
template void mixture_product_backward<2>(const Mixture<float>&, const Gradients<float>&, float*, float*, Stream);

}  // namespace fastvae::cuda
