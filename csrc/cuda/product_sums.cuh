// Sums of weighted features: the score, and the gradients of the parameters, in the product form (product.h).
//
// The kernel has two sides.  Own items i are the rows and other items j the components for the score, and the reverse
// for the parameters.  With b_ij the logarithm (base 2) of a pair's weight,
//
//   b_ij = acc_ij scale_i scale_j + c'_k [+ constant_m, where the components are the own items]
//   total_i = sum_j 2^(b_ij + weighted_j) inverse_scale_j       sums_i = sum_j sign_j 2^(b_ij + weighted_j) x_j
//
// with acc_ij the product of the items' own features, x_j the other item's, and weighted_j the exponent of its scale.  A
// row's constant is minus the logarithm of its density without R, so that weights are responsibilities.  What cancels may
// be large, and its roundings many bits: weights sum up to one nevertheless, because acc and the sum with c' have the same
// bits on both sides and in forward, and the row's constant comes after them.
//
// A reference near the largest exponent so far is subtracted, and where a larger one appears, what was summed is scaled
// down, as in flash attention.  So no exponent is too large, for whatever scales the items have.
//
// A block has 128 own items and goes through the others, 64 at a time.  A warp has 16 own items:
// their features stay in registers, the weights go from one product to the other in registers, and so do the sums.
//
// kCertified ("highest"): pairs that are not certified and count are computed in the difference form, and sums lose less.
// Others come 32 at a time, because the certificate needs registers too.  The score's other items have a line of squares
// beside their features, which are summed as well: the spread.
#pragma once

#include "../common/compensated.h"
#include "certificate.cuh"
#include "product_tile.cuh"

namespace fastvae::cuda {

template <bool kCertified>
constexpr int kOthers = kCertified ? 32 : 64;
template <bool kCertified>
constexpr int kStages = kCertified ? 4 : 3;  // together they have room for a line of the own items
static_assert(kStages<true> * kOthers<true> >= kOwnItems && kStages<false> * kOthers<false> >= kOwnItems);
constexpr int kMaxSteps = 8;  // more features and their sums would not fit into the registers: see product_slices.cu
constexpr int kSliceSteps = 16;

// What is subtracted from exponents whose largest is `max`.  Weights then reach 2^14, as fp16 numbers are precise above
// 2^-14 only.  Where |max| is so large that the difference would be rounded, they reach 1.
__device__ __forceinline__ float reference_below(float max) { return fabs(max) < 16777216.0f ? max - 14.0f : max; }

struct SumsTask {
  Items own, other;
  FeatureShape shape;
  int64_t others;          // without the padding
  const int64_t* exclude;  // [M], or null
  int64_t M;
  float limit;               // pairs whose b is below it have no weight: the skipping rule, on the components' side
  float negligible;          // bits below the largest weight so far at which a pair does not count in the sums
  float max_exponent;        // of a weight, on the rows' side: see make_weights
  const float* doubtful;     // [own.count] or null: blocks whose own items are all 0 here have nothing to do
  int splits, slices;        // slices: of the features, see product_slices.cu
  int columns;               // of the sums: the features, and the spread
  float *reference, *total;  // [splits, own.count]
  float* sums;               // [splits, own.count, columns]; null where only totals are wanted
};

// Whether a block has anything to do.
__device__ __forceinline__ bool has_work(const SumsTask& task, int first_own) {
  if (!task.doubtful) return true;
  bool any = false;
  for (int i = int(threadIdx.x) % 32; i < kOwnItems; i += 32) any |= task.doubtful[first_own + i] != 0.0f;
  return __any_sync(0xFFFFFFFFu, any);
}

// The pieces of a warp's tile: 16 own items, of which a lane has lane / 4 and 8 further, and kTiles times 8 others, of
// which it has two of each 8: b[j][i] is that of own item i / 2 and other 8 j + i % 2.  `terms` are those of the lane's
// first other.

// Adds the products of kStep features: the own items' are in registers, and the others' begin at `unit` of their lines.
template <bool kOwnAreRows, int kParts, int kTiles>
__device__ __forceinline__ void add_products(float (&b)[kTiles][4], const uint32_t (&own)[kParts][4],
                                             const uint4* lines, int unit) {
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    uint32_t y[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) load_as_columns(y[part], lines, 16 * j, 4 * part + unit);
    add_product<kParts, kOwnAreRows>(b[2 * j], own, y, 0);
    add_product<kParts, kOwnAreRows>(b[2 * j + 1], own, y, 1);
  }
}

// Scales the products, and adds the components' constants.
template <bool kOwnAreRows, int kTiles>
__device__ __forceinline__ void scale_products(float (&b)[kTiles][4], const ItemTerms* own, const ItemTerms* terms) {
  const float scale[2] = {own[0].scale, own[8].scale}, constant[2] = {own[0].constant, own[8].constant};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ItemTerms& other = terms[8 * j + i % 2];
      b[j][i] = fma(b[j][i], scale[i / 2] * other.scale, kOwnAreRows ? other.constant : constant[i / 2]);
    }
  }
}

// Adds what the other items, which are rows, have: their constants, and the exponents of their weights.
template <int kTiles>
__device__ __forceinline__ void add_rows(float (&b)[kTiles][4], const ItemTerms* terms, float limit) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ItemTerms& row = terms[8 * j + i % 2];
      b[j][i] += row.constant;
      b[j][i] = b[j][i] < limit ? -INFINITY : b[j][i] + row.weighted;
    }
  }
}

// first_other: of the lane.
template <bool kOwnAreRows, int kTiles>
__device__ __forceinline__ void leave_out_excluded(float (&b)[kTiles][4], const SumsTask& task, int lane_own,
                                                   int first_other) {
  if (!task.exclude) return;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = lane_own + i / 2 * 8, other = first_other + 8 * j + i % 2;
      const int m = kOwnAreRows ? own : other, k = kOwnAreRows ? other : own;
      if (m < task.M && task.exclude[m] == k) b[j][i] = -INFINITY;
    }
  }
}

// What is left to add to b: the components' exponents only after a reference of any size is subtracted, so that they are
// not lost in it.
template <bool kOwnAreRows>
__device__ __forceinline__ float weighted(float x, const ItemTerms& other) {
  return kOwnAreRows ? x + other.weighted : x;
}

// Raises the largest exponent of an own item, 0 or 1 of the lane's, where one of b's is larger; then what was summed has to
// shrink by a factor.
template <bool kOwnAreRows, int kTiles>
__device__ __forceinline__ bool is_raised(float& max, float& shrink, int half, const float (&b)[kTiles][4],
                                          const ItemTerms* terms) {
  float largest = max;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    largest = fmaxf(largest, fmaxf(weighted<kOwnAreRows>(b[j][2 * half], terms[8 * j]),
                                   weighted<kOwnAreRows>(b[j][2 * half + 1], terms[8 * j + 1])));
  largest = quad_max(largest);
  if (!__any_sync(0xFFFFFFFFu, largest > max)) return false;
  shrink = exp2_term(reference_below(max) - reference_below(largest));
  max = largest;
  return true;
}

template <int kSums>
__device__ __forceinline__ void shrink_sums(float (&sums)[kSums][4], int half, float factor) {
#pragma unroll
  for (int j = 0; j < kSums; ++j) sums[j][2 * half] *= factor, sums[j][2 * half + 1] *= factor;
}

// The weights, in the places of an operand of the second product: hi, and lo.  Adds them to `total`, and says which groups
// of 16 others have one that counts.
//
// A far row's exponents are rounded to multiples of 32 or more, and so is its reference: an exponent less the reference
// may be 16 or more, for a weight beyond fp16.  Such a weight is cut off, in the sums and in the total alike, so that
// weights still sum to one.
template <bool kOwnAreRows, int kParts, int kTiles>
__device__ __forceinline__ unsigned make_weights(uint32_t (&weights)[kTiles / 2][kParts][4], float (&total)[2],
                                                 const float (&b)[kTiles][4], const float (&max)[2],
                                                 const ItemTerms* terms, const SumsTask& task) {
  unsigned active = 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const ItemTerms &first = terms[8 * j], &second = terms[8 * j + 1];
    bool counts = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = reference_below(max[half]);
      float x[2] = {weighted<kOwnAreRows>(b[j][2 * half] - reference, first),
                    weighted<kOwnAreRows>(b[j][2 * half + 1] - reference, second)};
      counts |= !(fmaxf(x[0], x[1]) < max[half] - reference - task.negligible);
      if constexpr (kOwnAreRows)
        for (float& each : x) each = each > task.max_exponent ? task.max_exponent : each;  // NaN stays
      float w[2] = {exp2_term(x[0]), exp2_term(x[1])};
      total[half] = fma(w[0], first.inverse_scale, fma(w[1], second.inverse_scale, total[half]));
      w[0] = copysignf(w[0], first.inverse_scale), w[1] = copysignf(w[1], second.inverse_scale);
      const __half2 hi = __floats2half2_rn(w[0], w[1]);
      uint32_t (&group)[kParts][4] = weights[j / 2];
      memcpy(&group[0][j % 2 * 2 + half], &hi, sizeof hi);
      if constexpr (kParts == 2) {
        const float2 back = __half22float2(hi);
        const __half2 lo = __floats2half2_rn(w[0] - back.x, w[1] - back.y);
        memcpy(&group[1][j % 2 * 2 + half], &lo, sizeof lo);
      }
    }
    if (__any_sync(0xFFFFFFFFu, counts)) active |= 1u << j / 2;
  }
  return active;
}

// Adds the weighted sums of kStep features, which begin at `unit` of the others' lines.  The products of all groups of 16
// others are summed from 0, as in add_product; where kCertified, those of each.
template <bool kCertified, int kParts, int kGroups>
__device__ __forceinline__ void add_weighted(float (&first)[4], float (&second)[4], const uint4* lines, int unit,
                                             const uint32_t (&weights)[kGroups][kParts][4], unsigned active) {
  const int lane = int(threadIdx.x) % 32;
  float part[2][4] = {}, step_sums[2][4] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (!(active >> group & 1)) continue;
    uint32_t x[kParts][4];
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      load_matrices_transposed(x[p],
                               lines + (16 * group + lane % 16) * 8 + ((4 * p + unit) ^ (lane / 16) ^ (lane % 8)));
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if constexpr (kParts == 2) {
        multiply_add(part[column], weights[group][1], x[0][2 * column], x[0][2 * column + 1]);
        multiply_add(part[column], weights[group][0], x[1][2 * column], x[1][2 * column + 1]);
      }
      multiply_add(part[column], weights[group][0], x[0][2 * column], x[0][2 * column + 1]);
      if constexpr (kCertified) {
#pragma unroll
        for (int i = 0; i < 4; ++i) step_sums[column][i] += part[column][i], part[column][i] = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    first[i] += kCertified ? step_sums[0][i] : part[0][i];
    second[i] += kCertified ? step_sums[1][i] : part[1][i];
  }
}

// Stores the sums of an own item: 8 kSums features at most, from `to` on.
template <int kSums>
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[kSums][4], int half, int features) {
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    if (8 * j >= features) break;
    *reinterpret_cast<float2*>(to + 8 * j + threadIdx.x % 4 * 2) =
        make_float2(sums[j][2 * half], sums[j][2 * half + 1]);
  }
}

template <bool kOwnAreRows, bool kCertified>
constexpr bool kWithSpread = kOwnAreRows && kCertified;
constexpr int kSpreadSteps = kMaxSteps / 2;

template <bool kOwnAreRows, bool kCertified>
int64_t sums_shared_bytes(int lines) {
  const int64_t item = int64_t(lines + kWithSpread<kOwnAreRows, kCertified>) * kLineBytes + sizeof(ItemTerms) +
                       (kCertified ? sizeof(ItemBounds) : 0);
  return kStages<kCertified> * kOthers<kCertified> * item + (kCertified ? 16 : 0);
}

template <int kParts, bool kOwnAreRows, bool kCertified>
__global__ void __launch_bounds__(kThreads, 1) weighted_sums(SumsTask task, Mixture<float> mix, Features features) {
  static_assert(!kCertified || kParts == 2);
  if (kCertified && is_off(features.only_if)) return;
  constexpr int kLineSteps = kLineFeatures<kParts> / kStep, kOthers = cuda::kOthers<kCertified>,
                kStages = cuda::kStages<kCertified>;
  constexpr bool kWithSpread = cuda::kWithSpread<kOwnAreRows, kCertified>;
  const int lines = task.shape.lines, steps = task.shape.steps, stage_units = kOthers * 8 * (lines + kWithSpread);
  uint4* const stages = reinterpret_cast<uint4*>(shared_memory);
  ItemTerms* const stage_terms = reinterpret_cast<ItemTerms*>(stages + kStages * stage_units);
  ItemBounds* const stage_bounds = reinterpret_cast<ItemBounds*>(stage_terms + kStages * kOthers);
  int* const given_up = reinterpret_cast<int*>(stage_bounds + kStages * kOthers);  // [2]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int first_own = int(blockIdx.x) * kOwnItems, lane_own = first_own + warp * 16 + lane / 4;
  if (!has_work(task, first_own)) return;
  const int all = int((task.others + kOthers - 1) / kOthers);
  const int begin = part_begin(all, task.splits, int(blockIdx.y)),
            end = part_begin(all, task.splits, int(blockIdx.y) + 1);

  int uncertain_pairs = 0;
  const auto look_whether_given_up = [&](int step) {
    if (kCertified && threadIdx.x == 0) given_up[step & 1] = is_given_up(features, kOwnAreRows);
  };
  look_whether_given_up(begin - 1);

  // The own items' features, by way of the stages' memory.
  uint32_t own[kMaxSteps][kParts][4];
  for (int line = 0; line < lines; ++line) {
    copy_lines<kOwnItems>(stages, task.own.lines, first_own, lines, line);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      if (step / kLineSteps != line) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        load_as_rows(own[step][part], stages, warp * 16, 4 * part + 2 * (step % kLineSteps));
    }
    __syncthreads();
  }

  const auto copy = [&](int step) {
    if (step < end) {
      const int stage = (step - begin) % kStages;
#pragma unroll 1
      for (int line = 0; line < lines; ++line)
        copy_lines<kOthers>(stages + stage * stage_units + line * kOthers * 8, task.other.lines,
                            int64_t(step) * kOthers, lines, line);
      if (kWithSpread)
        copy_lines<kOthers>(stages + stage * stage_units + lines * kOthers * 8, features.spreads,
                            int64_t(step) * kOthers, 1, 0);
      if (int(threadIdx.x) < kOthers) {
        const int to = stage * kOthers + int(threadIdx.x);
        const int64_t from = int64_t(step) * kOthers + threadIdx.x;
        __pipeline_memcpy_async(stage_terms + to, task.other.terms + from, sizeof(ItemTerms));
        if (kCertified) __pipeline_memcpy_async(stage_bounds + to, task.other.bounds + from, sizeof(ItemBounds));
      }
    }
    __pipeline_commit();  // an empty group, where nothing is left to copy
  };
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) copy(begin + ahead);

  float sums[2 * kMaxSteps][4] = {}, total[2] = {}, total_lost[2] = {};
  float spread[kWithSpread ? 2 * kSpreadSteps : 1][4] = {};
  float max[2] = {Limits<float>::kLowest, Limits<float>::kLowest};
  for (int now = begin; now < end; ++now) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the stage that is copied to next
    if (kCertified && given_up[(now - 1) & 1]) return;
    look_whether_given_up(now);
    copy(now + kStages - 1);
    const int stage = (now - begin) % kStages;
    const uint4* others = stages + stage * stage_units;
    const ItemTerms* terms = stage_terms + stage * kOthers + lane % 4 * 2;

    float b[kOthers / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      if (step >= steps) break;
      const uint4* line = others + step / kLineSteps * kOthers * 8;
      add_products<kOwnAreRows>(b, own[step], line, 2 * (step % kLineSteps));
    }
    scale_products<kOwnAreRows>(b, task.own.terms + lane_own, terms);
    if constexpr (kCertified) {
      unsigned uncertain = 0;  // a bit for each of the lane's pairs
      const ItemBounds* bounds = stage_bounds + stage * kOthers + lane % 4 * 2;
      const float slope = allowed_slope(mix.D);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const ItemBounds own_bounds = task.own.bounds[lane_own + 8 * half];
#pragma unroll
        for (int j = 0; j < kOthers / 8; ++j) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const ItemBounds& other = bounds[8 * j + i % 2];
            const ItemBounds &row = kOwnAreRows ? own_bounds : other, &component = kOwnAreRows ? other : own_bounds;
            const float e = fma(row.linear, component.linear, row.square * component.square);
            const bool certified = fma(slope, b[j][i], e + row.shift) <= component.allowed && e <= kMaxError;
            const bool left_out = !kOwnAreRows && b[j][i] + e + terms[8 * j + i % 2].constant < task.limit;
            uncertain |= unsigned(!certified && !left_out) << (4 * j + i);
          }
        }
      }
      if (__any_sync(0xFFFFFFFFu, uncertain != 0)) {
        uncertain_pairs += warp_count(uncertain);
        if (uncertain_pairs > kMaxUncertain / 2 * (now - begin + kHeadStart)) {
          if (lane == 0) *features.uncertain = kGivenUp;
        } else {
#pragma unroll 1
          while (__any_sync(0xFFFFFFFFu, uncertain != 0)) {  // one pair of each lane that has some left
            const int bit = __ffs(int(uncertain)) - 1;
            float exact = 0;
            const int own_item = lane_own + bit % 4 / 2 * 8,
                      other = now * kOthers + bit / 4 * 8 + lane % 4 * 2 + bit % 2;
            for_each_uncertain(mix, features, __ballot_sync(0xFFFFFFFFu, uncertain != 0),
                               kOwnAreRows ? own_item : other, kOwnAreRows ? other : own_item,
                               [&](float exponent) { exact = exponent; });
#pragma unroll
            for (int n = 0; n < kOthers / 2; ++n)
              if (n == bit) b[n / 4][n % 4] = exact;
            uncertain &= uncertain - 1;
          }
        }
      }
    }
    if constexpr (!kOwnAreRows) add_rows(b, terms, task.limit);
    leave_out_excluded<kOwnAreRows>(b, task, lane_own, now * kOthers + lane % 4 * 2);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float shrink;
      if (!is_raised<kOwnAreRows>(max[half], shrink, half, b, terms)) continue;
      total[half] *= shrink;
      if (kCertified) total_lost[half] *= shrink;
      shrink_sums(sums, half, shrink);
      if constexpr (kWithSpread) shrink_sums(spread, half, shrink);
    }

    uint32_t weights[kOthers / 16][kParts][4];
    float step_total[2] = {};
    const unsigned active =
        make_weights<kOwnAreRows, kParts>(weights, kCertified ? step_total : total, b, max, terms, task);
    if constexpr (kCertified) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        CompensatedSum<float> sum = {total[half], total_lost[half]};
        sum.add(step_total[half]);
        total[half] = sum.sum, total_lost[half] = sum.compensation;
      }
    }
    if (!task.sums || !active) continue;
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      if (step >= steps) break;
      const uint4* line = others + step / kLineSteps * kOthers * 8;
      add_weighted<kCertified>(sums[2 * step], sums[2 * step + 1], line, 2 * (step % kLineSteps), weights, active);
    }
    if constexpr (kWithSpread) {
#pragma unroll
      for (int step = 0; step < kSpreadSteps; ++step) {
        if (kStep * step >= task.columns - kStep * steps) break;
        float part[2][4] = {};
#pragma unroll
        for (int group = 0; group < kOthers / 16; ++group) {
          uint32_t x[4];
          const int unit = (2 * step) ^ (lane / 16) ^ (lane % 8);
          load_matrices_transposed(x, others + (lines * kOthers + 16 * group + lane % 16) * 8 + unit);
#pragma unroll
          for (int column = 0; column < 2; ++column)
            multiply_add(part[column], weights[group][0], x[2 * column], x[2 * column + 1]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) spread[2 * step + i / 4][i % 4] += part[i / 4][i % 4];
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t own_item = lane_own + 8 * half, to = int64_t(blockIdx.y) * task.own.count + own_item;
    const float sum = quad_sum(kCertified ? total[half] + total_lost[half] : total[half]);
    if (lane % 4 == 0) task.reference[to] = reference_below(max[half]), task.total[to] = sum;
    if (!task.sums) continue;
    float* const out = task.sums + to * task.columns;
    store_sums(out, sums, half, kStep * steps);
    if constexpr (kWithSpread) store_sums(out + kStep * steps, spread, half, task.columns - kStep * steps);
  }
}

// The same, of more than kMaxSteps steps, in product_slices.cu.
template <int kParts, bool kOwnAreRows>
void launch_sliced_sums(const SumsTask&, Stream);

}  // namespace fastvae::cuda
