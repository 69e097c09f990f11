// log p(z) in the product form (product.h): kernel, plan and launch.
//
// A block has 128 rows and goes through panels of components.  A warp has 32 rows x half a panel, with the sums in
// registers.  The block's rows stay in shared memory where their lines are few; while one line of a panel is
// worked on, the next one is copied there.  Two blocks run at a time on a multiprocessor with enough shared memory, so
// that the exponentials of one overlap with the products of the other.
#include "certificate.cuh"
#include "product_tile.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kRows = kOwnItems;
// The components of a panel, and those of it that a warp has.  In "high" they are fewer, because the parts of a product
// need registers as well, and so does the certificate.
template <int kParts, bool kCertified>
constexpr int kWarpColumns = kCertified    ? 32
                             : kParts == 2 ? 48
                                           : 64;
template <int kParts, bool kCertified>
constexpr int kPanel = 2 * kWarpColumns<kParts, kCertified>;
static_assert(kPanel<2, false> == kHighPanel && kOwnItems % kPanel<2, true> == 0 && kOwnItems % kPanel<1, false> == 0);
template <int kParts>
constexpr int kResidentLines = kParts == 2 ? 4 : 3;  // of the rows, at most: there is memory for 99 KiB

struct ComponentTerms {  // the first two of ItemTerms
  float constant, scale;
};

template <int kParts, bool kResident, bool kCertified>
int64_t shared_bytes(int lines) {
  const int64_t row_tiles = kResident ? lines : 2;
  return (2 * kPanel<kParts, kCertified> + row_tiles * kRows) * kLineBytes +
         2 * kPanel<kParts, kCertified> * sizeof(ComponentTerms) + kRows * (2 * sizeof(BinaryLogSum) + sizeof(float)) +
         (kCertified ? (2 * kPanel<kParts, kCertified> + kRows) * sizeof(ItemBounds) + 16 : 0);
}

// A pair that is 2^-extra / K of the largest term so far does not count: K of them are less than a quarter of a rounding.
inline float negligible_bits(int64_t K) { return 26.0f + std::log2(float(K)); }

// Writes l.  Where |l| is large its rounding moves backward's weights exp(a - l), unless a has the same bits in forward:
// so a certified l is taken up to the size of which a rounding is 1e-4.
__device__ __forceinline__ void store_log_prob(const BinaryLogSum& sum, float row_term, int* uncertain, float& to) {
  to = sum.log(row_term);
  if (uncertain && fabs(to) > 2048.0f && fabs(to) < INFINITY) *uncertain = 1;
}

// partial [splits, M]; null where there is one split, which writes log_prob itself.
// kCertified: pairs that are not certified are computed in the difference form.  Where they are many, the kernel says so
// in features.uncertain and ends, and what it has written does not count.
template <int kParts, bool kResident, bool kCertified>
__global__ void __launch_bounds__(kThreads, 2) product_forward(Mixture<float> mix, Features features, float negligible,
                                                               int splits, BinaryLogSum* partial, float* log_prob) {
  constexpr int kSteps = kLineFeatures<kParts> / kStep;  // of a line
  constexpr int kColumns = kPanel<kParts, kCertified>, kTiles = kWarpColumns<kParts, kCertified> / 8;
  const int lines = features.shape.lines;
  // Two stages of a panel's line, the rows' lines (all, or those of the two stages), two panels' terms, the sums of the
  // rows, [2, kRows] for the two halves of a panel, the rows' scales, and what the certificate needs.
  uint4* const stages = reinterpret_cast<uint4*>(shared_memory);
  uint4* const row_lines = stages + 2 * kColumns * 8;
  ComponentTerms* const panel_terms =
      reinterpret_cast<ComponentTerms*>(row_lines + (kResident ? lines : 2) * kRows * 8);
  BinaryLogSum* const row_sums = reinterpret_cast<BinaryLogSum*>(panel_terms + 2 * kColumns);
  float* const row_scales = reinterpret_cast<float*>(row_sums + 2 * kRows);
  ItemBounds* const row_bounds = reinterpret_cast<ItemBounds*>(row_scales + kRows);
  ItemBounds* const panel_bounds = row_bounds + kRows;
  int* const given_up = reinterpret_cast<int*>(panel_bounds + 2 * kColumns);
  const int panels = int((mix.K + kColumns - 1) / kColumns);
  const int begin = part_begin(panels, splits, int(blockIdx.y)), end = part_begin(panels, splits, int(blockIdx.y) + 1);
  const int first_row = int(blockIdx.x) * kRows;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warp_row = warp / 2 * 32;
  const int warp_column = warp % 2 * kWarpColumns<kParts, kCertified>;

  if (kCertified && int(threadIdx.x) < kRows) row_bounds[threadIdx.x] = features.rows.bounds[first_row + threadIdx.x];
  int uncertain_pairs = 0;

  const auto copy = [&](int panel, int line, int stage) {
    const int64_t first = int64_t(panel) * kColumns;
    copy_lines<kColumns>(stages + stage * kColumns * 8, features.components.lines, first, lines, line);
    if (!kResident) copy_lines<kRows>(row_lines + stage * kRows * 8, features.rows.lines, first_row, lines, line);
    const int column = int(thread_index());
    if (line == 0 && column < kColumns) {
      const int to = panel % 2 * kColumns + column;
      __pipeline_memcpy_async(panel_terms + to, features.components.terms + first + column, sizeof(ComponentTerms));
      if (kCertified)
        __pipeline_memcpy_async(panel_bounds + to, features.components.bounds + first + column, sizeof(ItemBounds));
    }
    __pipeline_commit();
  };
  if (kResident)
    for (int line = 0; line < lines; ++line)
      copy_lines<kRows>(row_lines + line * kRows * 8, features.rows.lines, first_row, lines, line);
  if (begin < end) copy(begin, 0, 0);

  // A lane has a quarter of the columns of rows 16 i + 8 half + lane / 4 of its warp's, for i, half = 0, 1.
  const int lane_row = warp_row + lane / 4;
  row_sums[threadIdx.x] = {};
  if (int(threadIdx.x) < kRows) row_scales[threadIdx.x] = features.rows.terms[first_row + threadIdx.x].scale;

  float a[2][kTiles][4] = {};
  int stage = 0;
  for (int panel = begin, line = 0; panel < end;) {
    const bool last_line = line + 1 == lines;
    const int next_panel = last_line ? panel + 1 : panel, next_line = last_line ? 0 : line + 1;
    __pipeline_wait_prior(0);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the other stage any more
    if (kCertified && line == 0 && panel > begin && given_up[(panel - 1) % 2]) return;
    if (next_panel < end) copy(next_panel, next_line, 1 - stage);
    const uint4* rows = row_lines + (kResident ? line : stage) * kRows * 8;
    const uint4* columns = stages + stage * kColumns * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (line * kSteps + step >= features.shape.steps) break;
      uint32_t x[2][kParts][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          load_as_rows(x[i][part], rows, warp_row + 16 * i, 4 * part + 2 * step);
      }
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        uint32_t y[4];
        if constexpr (kParts == 1) {
          load_as_columns(y, columns, warp_column + 16 * j, 2 * step);
#pragma unroll
          for (int n = 0; n < 4; ++n)
            multiply_add(a[n / 2][2 * j + n % 2], x[n / 2][0], y[n % 2 * 2], y[n % 2 * 2 + 1]);
        } else {
          float part[4][4] = {};
          load_as_columns(y, columns, warp_column + 16 * j, 4 + 2 * step);
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_add(part[n], x[n / 2][0], y[n % 2 * 2], y[n % 2 * 2 + 1]);
          load_as_columns(y, columns, warp_column + 16 * j, 2 * step);
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_add(part[n], x[n / 2][1], y[n % 2 * 2], y[n % 2 * 2 + 1]);
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_add(part[n], x[n / 2][0], y[n % 2 * 2], y[n % 2 * 2 + 1]);
#pragma unroll
          for (int n = 0; n < 16; ++n) a[n / 8][2 * j + n / 4 % 2][n % 4] += part[n / 4][n % 4];
        }
      }
    }
    if (last_line) {
      const ComponentTerms* terms = panel_terms + panel % 2 * kColumns + warp_column + lane % 4 * 2;
      float scale[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = row_scales[lane_row + 8 * i];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 two = *reinterpret_cast<const float4*>(terms + 8 * j);  // of two components
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* pair = &a[i][j][2 * half];
            pair[0] = fma(pair[0], scale[i][half] * two.y, two.x);
            pair[1] = fma(pair[1], scale[i][half] * two.w, two.z);
          }
        }
      }
      if (mix.exclude) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t m = first_row + lane_row + 8 * i;
          const int64_t excluded = m < mix.M ? mix.exclude[m] - (panel * kColumns + warp_column + lane % 4 * 2) : -1;
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j)
            if (excluded == j / 2 * 8 + j % 2) a[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
        }
      }
      if constexpr (kCertified) {
        unsigned uncertain = 0;  // a bit for each of the lane's pairs
        const ItemBounds* bounds = panel_bounds + panel % 2 * kColumns + warp_column + lane % 4 * 2;
        const float slope = allowed_slope(mix.D);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const ItemBounds row = row_bounds[lane_row + 8 * i];
          const auto pair = [&](int j) { return a[i / 2][j / 2][i % 2 * 2 + j % 2]; };
          const auto component = [&](int j) -> const ItemBounds& { return bounds[j / 2 * 8 + j % 2]; };
          const auto error = [&](int j) {
            return fma(row.linear, component(j).linear, row.square * component(j).square);
          };
          // What the row's largest exponent is at least: of the panels before, and by the bounds of this one.
          float least = -INFINITY;
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j) least = fmaxf(least, pair(j) - error(j));
          least = fmaxf(quad_max(least), row_sums[warp % 2 * kRows + lane_row + 8 * i].max) - negligible;
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j) {
            const float x = pair(j), e = error(j);
            const bool certified = fma(slope, x, e + row.shift) <= component(j).allowed && e <= kMaxError;
            const bool left_out = x == -INFINITY || x + e < least;
            uncertain |= unsigned(!certified && !left_out) << (2 * kTiles * i + j);
          }
        }
        if (__any_sync(0xFFFFFFFFu, uncertain != 0)) {
          uncertain_pairs += warp_count(uncertain);
          if (uncertain_pairs > kMaxUncertain * (panel - begin + kHeadStart)) {
            if (lane == 0) *features.uncertain = kGivenUp;
          } else {
#pragma unroll 1
            while (__any_sync(0xFFFFFFFFu, uncertain != 0)) {  // one pair of each lane that has some left
              const int bit = __ffs(int(uncertain)) - 1, j = bit % (2 * kTiles);
              float exact = 0;
              for_each_uncertain(mix, features, __ballot_sync(0xFFFFFFFFu, uncertain != 0),
                                 first_row + lane_row + bit / (2 * kTiles) * 8,
                                 panel * kColumns + warp_column + lane % 4 * 2 + j / 2 * 8 + j % 2,
                                 [&](float exponent) { exact = exponent; });
#pragma unroll
              for (int n = 0; n < 8 * kTiles; ++n)
                if (n == bit) a[n / (4 * kTiles)][n % (2 * kTiles) / 2][n / (2 * kTiles) % 2 * 2 + n % 2] = exact;
              uncertain &= uncertain - 1;
            }
          }
        }
        if (threadIdx.x == 0) given_up[panel % 2] = *static_cast<volatile int*>(features.uncertain);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float largest = -INFINITY;
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j) largest = fmaxf(largest, a[i][j / 2][2 * half + j % 2]);
          largest = quad_max(largest);
          BinaryLogSum& sum = row_sums[warp % 2 * kRows + lane_row + 16 * i + 8 * half];
          const float before = sum.max, max = fmaxf(before, largest);
          // Of eight rows against all the warp's components all may be negligible, which in a trained mixture is the rule.
          if (__any_sync(0xFFFFFFFFu, !(largest < max - negligible))) {
            float total = 0;
#pragma unroll
            for (int j = 0; j < 2 * kTiles; ++j) total += exp2_term(a[i][j / 2][2 * half + j % 2] - max);
            total = quad_sum(total);
            if (lane % 4 == 0) sum = {max, sum.total * exp2_term(before - max) + total};
          }
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j) a[i][j / 2][2 * half + j % 2] = 0;
        }
      }
    }
    stage = 1 - stage;
    panel = next_panel, line = next_line;
  }

  __syncthreads();
  const int64_t m = first_row + threadIdx.x;
  if (int(threadIdx.x) >= kRows || m >= mix.M) return;
  BinaryLogSum sum = row_sums[threadIdx.x];
  sum.merge(row_sums[kRows + threadIdx.x]);
  if (partial)
    partial[int64_t(blockIdx.y) * mix.M + m] = sum;
  else
    store_log_prob(sum, features.row_term[m], features.uncertain, log_prob[m]);
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads)
    merge_product_splits(const BinaryLogSum* partial, const float* row_term, int64_t M, int64_t splits, int* uncertain,
                         float* log_prob) {
  if (uncertain && __any_sync(0xFFFFFFFFu, *static_cast<volatile int*>(uncertain))) return;
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  BinaryLogSum sum;
  if (m < M)
    for (int64_t i = threadIdx.x % 32; i < splits; i += 32) sum.merge(partial[i * M + m]);
  sum = merge_across(sum, 32);
  if (m < M && threadIdx.x % 32 == 0) store_log_prob(sum, row_term[m], uncertain, log_prob[m]);
}

template <int kParts, bool kCertified>
struct ForwardPlan {
  Scratch<float> scratch;
  Features features;
  int64_t splits;
  BinaryLogSum* partial;

  ForwardPlan(const Mixture<float>& mix, float* memory) : scratch(memory) {
    features = Features::plan<kParts>(mix, !mix.shared, kCertified ? Bounds::certificate : Bounds::none, scratch);
    splits =
        plan_splits(blocks_for(mix.K, kPanel<kParts, kCertified>), features.rows.count / kRows, 2 * kMultiprocessors);
    partial = reinterpret_cast<BinaryLogSum*>(scratch.take(splits > 1 ? 2 * splits * mix.M : 0));
  }
};

// uncertain: null without a certificate.
template <int kParts, bool kCertified>
void run(const Mixture<float>& mix, int* uncertain, float* scratch, float* log_prob, Stream stream) {
  const ForwardPlan<kParts, kCertified> plan(mix, scratch);
  Features features = plan.features;
  features.uncertain = uncertain;
  pack_features<kParts>(mix, {}, features, stream);
  const auto start = [&](auto kernel, int64_t bytes) {
    launch(stream, features.rows.count / kRows, plan.splits, kThreads, size_t(bytes), kernel, mix, features,
           negligible_bits(mix.K), plan.splits, plan.partial, log_prob);
  };
  const int lines = features.shape.lines;
  if (lines <= kResidentLines<kParts>)
    start(product_forward<kParts, true, kCertified>, shared_bytes<kParts, true, kCertified>(lines));
  else
    start(product_forward<kParts, false, kCertified>, shared_bytes<kParts, false, kCertified>(lines));
  if (plan.partial)
    launch(stream, blocks_for(mix.M, kThreads / 32), 1, kThreads, 0, merge_product_splits, plan.partial,
           features.row_term, mix.M, plan.splits, uncertain, log_prob);
}

}  // namespace

template <int kParts>
int64_t product_forward_scratch(const Mixture<float>& mix) {
  return ForwardPlan<kParts, false>(mix, nullptr).scratch.size();
}

template <int kParts>
void mixture_product_forward(const Mixture<float>& mix, float* scratch, float* log_prob, Stream stream) {
  run<kParts, false>(mix, nullptr, scratch, log_prob, stream);
}

int64_t certified_forward_scratch(const Mixture<float>& mix) {
  return ForwardPlan<2, true>(mix, nullptr).scratch.size();
}

void mixture_certified_forward(const Mixture<float>& mix, int* uncertain, float* scratch, float* log_prob,
                               Stream stream) {
  run<2, true>(mix, uncertain, scratch, log_prob, stream);
}

template int64_t product_forward_scratch<1>(const Mixture<float>&);
template int64_t product_forward_scratch<2>(const Mixture<float>&);
template void mixture_product_forward<1>(const Mixture<float>&, float*, float*, Stream);
template void mixture_product_forward<2>(const Mixture<float>&, float*, float*, Stream);

}  // namespace fastvae::cuda
