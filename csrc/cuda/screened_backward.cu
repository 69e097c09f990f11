// The gradients of log p(z) where few pairs count, as in a trained mixture: screen.h says which are computed.
//
// The kernel has two sides, as that for all pairs (mixture_backward.cuh).  A block has 128 own items and goes through the
// others, 64 at a time; a warp has 16 own items, with their features in registers.  The warp then takes the pairs that are
// left, four at a time, and each lane two dimensions of a pair.  The sums of the own items lie in shared memory.  No other
// warp adds to them, and the pairs of an item come in one order.
#include "../common/skipping.h"
#include "product_tile.cuh"
#include "screen.h"

namespace fastvae::cuda {
namespace {

constexpr int kOthers = 64, kStages = 2;
constexpr int kMaxSteps = int(2 * kMaxScreenDimensions) / kStep, kMaxLines = kMaxSteps * kStep / kLineFeatures<1>;
constexpr int kAtOnce = 4;  // pairs that are on their way at a time
constexpr int kLaneDimensions = int(kMaxScreenDimensions) / 32;

// Of 16 own and 64 other items, how many pairs may be computed, on average: the kernel for all pairs is as fast where they
// are more.  Some more are allowed at first, because items may stand in an order.
constexpr int kMaxPairs = 64, kHeadStart = 8;

struct ScreenTask {
  Mixture<float> mix;
  Features features;
  const float *log_prob, *grad;  // [M]; grad null: all ones
  bool negated;
  int splits;
  float* dz;                        // on the rows' side
  float *dmu, *dlogvar, *dweights;  // on the components' side
};

struct ScreenShared {
  ScreenTerms terms[kStages][kOthers];
  int given_up[2];
};

template <bool kOwnAreRows>
int64_t shared_bytes(int64_t D, int lines) {
  const int64_t sums = kOwnItems * (kOwnAreRows ? D : 2 * D + 1);
  return int64_t(sizeof(ScreenShared)) + kStages * kOthers * lines * kLineBytes + round_up(sums, 4) * sizeof(float);
}
// A dimension that is no multiple of 4 takes less.
static_assert(sizeof(ScreenShared) + kStages * kOthers * kMaxLines * kLineBytes +
                  kOwnItems * (2 * kMaxScreenDimensions + 1) * sizeof(float) <=
              99 * 1024);

// The pairs of a warp that were found, in the lanes' order: takes the next one from the bits that the lanes have left.
struct FoundPair {
  bool exists;
  int own, other;  // in the warp's own items, and in the panel

  __device__ __forceinline__ explicit FoundPair(unsigned& bits) {
    const unsigned lanes = __ballot_sync(0xFFFFFFFFu, bits != 0);
    exists = lanes != 0;
    const int leader = exists ? __ffs(int(lanes)) - 1 : 0;
    const int bit = __shfl_sync(0xFFFFFFFFu, __ffs(int(bits)) - 1, leader);
    if (int(threadIdx.x) % 32 == leader) bits &= bits - 1;
    own = leader / 4 + (bit & 2) * 4;
    other = bit / 4 * 8 + leader % 4 * 2 + (bit & 1);
  }
};

template <bool kOwnAreRows>
__global__ void __launch_bounds__(kThreads, 2) screened_sums(ScreenTask task) {
  const Mixture<float>& mix = task.mix;
  const Features& features = task.features;
  const Items &owns = kOwnAreRows ? features.rows : features.components,
              &others = kOwnAreRows ? features.components : features.rows;
  const int lines = features.shape.lines, steps = features.shape.steps, D = int(mix.D);
  ScreenShared& shared = *reinterpret_cast<ScreenShared*>(shared_memory);
  uint4* const stages = reinterpret_cast<uint4*>(&shared + 1);
  // [own item, D] of dz; or of dmu, of dlogvar, and [own item] of the weights
  float* const sums = reinterpret_cast<float*>(stages + kStages * kOthers * 8 * lines);
  float* const square_sums = sums + kOwnItems * D;
  float* const weight_sums = square_sums + kOwnItems * D;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warp_own = warp * 16;
  const int64_t first_own = int64_t(blockIdx.x) * kOwnItems;
  const int64_t own_count = kOwnAreRows ? mix.M : mix.K, other_count = kOwnAreRows ? mix.K : mix.M;
  const int panels = int((other_count + kOthers - 1) / kOthers);
  const int begin = part_begin(panels, task.splits, int(blockIdx.y)),
            end = part_begin(panels, task.splits, int(blockIdx.y) + 1);
  const auto look_whether_given_up = [&](int panel) {
    if (threadIdx.x == 0) shared.given_up[panel & 1] = *static_cast<volatile int*>(features.uncertain);
  };
  look_whether_given_up(begin - 1);  // on the other side
  for (int i = int(threadIdx.x); i < kOwnItems * (kOwnAreRows ? D : 2 * D + 1); i += kThreads) sums[i] = 0.0f;
  uint32_t own[kMaxSteps][4];  // the own items' features, by way of the stages' memory
  for (int line = 0; line < lines; ++line) {
    copy_lines<kOwnItems>(stages, owns.lines, first_own, lines, line);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step)
      if (step / (kLineFeatures<1> / kStep) == line)
        load_as_rows(own[step], stages, warp_own, 2 * (step % (kLineFeatures<1> / kStep)));
    __syncthreads();
  }
  ScreenTerms own_terms[2];  // of the two own items of a lane
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t item = first_own + warp_own + lane / 4 + 8 * half;
    own_terms[half] = owns.screen[item];
    if (kOwnAreRows) own_terms[half].level = features.score_levels[item];
  }

  const auto copy = [&](int panel, int stage) {
    for (int line = 0; line < lines; ++line)
      copy_lines<kOthers>(stages + (stage * lines + line) * kOthers * 8, others.lines, int64_t(panel) * kOthers, lines,
                          line);
    if (int(threadIdx.x) < kOthers)
      __pipeline_memcpy_async(&shared.terms[stage][threadIdx.x], others.screen + int64_t(panel) * kOthers + threadIdx.x,
                              sizeof(ScreenTerms));
    __pipeline_commit();
  };
  if (begin < end) copy(begin, 0);
  int pairs = 0;
  for (int panel = begin, stage = 0; panel < end; ++panel, stage = 1 - stage) {
    __pipeline_wait_prior(0);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the other stage any more
    if (shared.given_up[(panel - 1) & 1]) return;
    look_whether_given_up(panel);
    if (panel + 1 < end) copy(panel + 1, 1 - stage);

    float products[kOthers / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      if (step >= steps) break;
      const int line = step / (kLineFeatures<1> / kStep), unit = 2 * (step % (kLineFeatures<1> / kStep));
#pragma unroll
      for (int j = 0; j < kOthers / 16; ++j) {
        uint32_t y[4];
        load_as_columns(y, stages + (stage * lines + line) * kOthers * 8, 16 * j, unit);
        multiply_add(products[2 * j], own[step], y[0], y[1]);
        multiply_add(products[2 * j + 1], own[step], y[2], y[3]);
      }
    }
    unsigned found = 0;  // a bit for each of the lane's pairs
#pragma unroll
    for (int j = 0; j < kOthers / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const ScreenTerms other = shared.terms[stage][8 * j + lane % 4 * 2 + i % 2], &mine = own_terms[i / 2];
        const float c = kOwnAreRows ? other.level : mine.level, limit = kOwnAreRows ? mine.level : other.level;
        const float error = fma(mine.linear, other.linear, mine.square * other.square);
        const float exponent = fma(products[j][i], mine.scale * other.scale, c);
        found |= unsigned(c != -INFINITY && !(exponent + error < limit)) << (4 * j + i);
      }
    }
    if (!__any_sync(0xFFFFFFFFu, found != 0)) continue;
    pairs += warp_count(found);
    if (pairs > kMaxPairs * (panel - begin + kHeadStart)) {
      if (lane == 0) *features.uncertain = 1;
      continue;
    }

    while (__any_sync(0xFFFFFFFFu, found != 0)) {
      int own_item[kAtOnce];
      int64_t row[kAtOnce], component[kAtOnce];
      float t[kAtOnce][kLaneDimensions], s[kAtOnce][kLaneDimensions], squares[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const FoundPair pair(found);
        own_item[n] = warp_own + pair.own;
        const int64_t mine = first_own + own_item[n], other = int64_t(panel) * kOthers + pair.other;
        row[n] = kOwnAreRows ? mine : other, component[n] = kOwnAreRows ? other : mine;
        const bool counts = pair.exists && row[n] < mix.M && component[n] < mix.K &&
                            !(mix.exclude && mix.exclude[row[n]] == component[n]);
        if (!counts) row[n] = -1;
        squares[n] = 0;
#pragma unroll
        for (int i = 0; i < kLaneDimensions; ++i) {
          const int d = lane + 32 * i;
          t[n][i] = s[n][i] = 0;
          if (!counts || d >= D) continue;
          s[n][i] = exp(-0.5f * bounded(logvar_of(mix, component[n], d)));
          t[n][i] = (mix.z[row[n] * D + d] - mix.mu[component[n] * D + d]) * s[n][i];
          squares[n] = fma(t[n][i], t[n][i], squares[n]);
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) squares[n] = group_sum(squares[n], 32);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (row[n] < 0) continue;
        const float a = fma(squares[n], -0.5f, features.peaks[component[n]]);
        const float w = upstream_gradient(task.grad, task.negated, row[n]) * exp_term(a - task.log_prob[row[n]]);
#pragma unroll
        for (int i = 0; i < kLaneDimensions; ++i) {
          const int d = lane + 32 * i, to = own_item[n] * D + d;
          if (d >= D) continue;
          const float wt = w * t[n][i];
          sums[to] = fma(wt, s[n][i], sums[to]);
          if (!kOwnAreRows) square_sums[to] = fma(wt, t[n][i], square_sums[to]);
        }
        if (!kOwnAreRows && lane == 0) weight_sums[own_item[n]] += w;
      }
    }
  }

  __syncwarp();
  for (int i = 0; i < 16; ++i) {
    const int64_t item = first_own + warp_own + i, to = int64_t(blockIdx.y) * own_count + item;
    if (item >= own_count) break;
    const float weight_sum = kOwnAreRows ? 0.0f : weight_sums[warp_own + i];
    for (int d = lane; d < D; d += 32) {
      const float sum = sums[(warp_own + i) * D + d];
      if (kOwnAreRows) task.dz[to * D + d] = -sum;
      if (!kOwnAreRows && task.dmu) task.dmu[to * D + d] = sum;
      if (!kOwnAreRows && task.dlogvar)
        task.dlogvar[to * D + d] = 0.5f * (square_sums[(warp_own + i) * D + d] - weight_sum);
    }
    if (!kOwnAreRows && task.dweights && lane == 0) task.dweights[to] = weight_sum;
  }
}

Features plan(const Mixture<float>& mix, Scratch<float>& scratch) {
  return Features::plan<1>(mix, !mix.shared, Bounds::screen, scratch);
}

template <bool kOwnAreRows>
void launch_side(ScreenTask task, int splits, Stream stream) {
  task.splits = splits;
  const int64_t own_items = kOwnAreRows ? task.mix.M : task.mix.K;
  launch(stream, blocks_for(own_items, kOwnItems), splits, kThreads,
         size_t(shared_bytes<kOwnAreRows>(task.mix.D, task.features.shape.lines)), screened_sums<kOwnAreRows>, task);
}

}  // namespace

int64_t screened_backward_scratch(const Mixture<float>& mix) {
  Scratch<float> scratch(nullptr);
  plan(mix, scratch);
  return scratch.size();
}

void mixture_screened_backward(const Mixture<float>& mix, const Gradients<float>& wanted, const SplitSums& to,
                               int* uncertain, float* memory, Stream stream) {
  Scratch<float> scratch(memory);
  ScreenTask task{mix,    plan(mix, scratch), wanted.log_prob, wanted.grad, wanted.negated, 0, to.dz,
                  to.dmu, to.dlogvar,         to.dweights};
  task.features.uncertain = uncertain;
  pack_features<1>(mix, {wanted.log_prob, wanted.grad, wanted.negated}, task.features, stream);
  if (to.dz) launch_side<true>(task, to.splits_z, stream);
  if (to.dmu || to.dlogvar || to.dweights) launch_side<false>(task, to.splits_parameters, stream);
}

}  // namespace fastvae::cuda
