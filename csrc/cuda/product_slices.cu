// Sums of weighted features as in product_sums.cuh, of more features than registers hold.
//
// A block makes the sums of a slice: kSliceSteps steps, which are 256 features.  Weights take all features, and each
// slice makes all of them.  Lines of the others come one at a time: all lines of 64 others for their exponents, then
// those of the slice once more for its sums.  The own items' lines stay in shared memory where it has room (`resident`);
// elsewhere they are copied anew with those of each 64 others.
#include "product_sums.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kSliceOthers = kOthers<false>, kSliceStages = 4;
constexpr int kSliceUnits = kSliceOthers * 8, kOwnUnits = kOwnItems * 8;  // of a line of the others, of the own items

int64_t sliced_shared_bytes(bool resident, int lines) {
  return (kSliceStages * kSliceUnits + (resident ? lines : kSliceStages) * kOwnUnits) * int64_t(sizeof(uint4)) +
         2 * kSliceOthers * int64_t(sizeof(ItemTerms));
}

template <int kParts, bool kOwnAreRows>
__global__ void __launch_bounds__(kThreads, 1) sliced_sums(SumsTask task, bool resident) {
  constexpr int kLineSteps = kLineFeatures<kParts> / kStep, kSliceLines = kSliceSteps / kLineSteps;
  // The terms of a tile take the place of those of two tiles before, which by then have to be out of use.
  static_assert(kMaxSteps / kLineSteps + 1 >= kSliceStages - 1, "a tile has as many lines as are copied ahead");
  const int lines = task.shape.lines, steps = task.shape.steps;
  const int slice = int(blockIdx.y) % task.slices, split = int(blockIdx.y) / task.slices;
  const int first_line = slice * kSliceLines, left = steps - slice * kSliceSteps;
  const int slice_steps = !task.sums ? 0 : left < kSliceSteps ? left : kSliceSteps;
  const int slice_lines = (slice_steps + kLineSteps - 1) / kLineSteps;
  uint4* const stages = reinterpret_cast<uint4*>(shared_memory);
  ItemTerms* const tile_terms = reinterpret_cast<ItemTerms*>(stages + kSliceStages * kSliceUnits);
  uint4* const own_lines = reinterpret_cast<uint4*>(tile_terms + 2 * kSliceOthers);  // all, or those of the stages
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int first_own = int(blockIdx.x) * kOwnItems, lane_own = first_own + warp * 16 + lane / 4;
  if (!has_work(task, first_own)) return;
  const int all = int((task.others + kSliceOthers - 1) / kSliceOthers);
  const int begin = part_begin(all, task.splits, split), end = part_begin(all, task.splits, split + 1);

  if (resident)
    for (int line = 0; line < lines; ++line)
      copy_lines<kOwnItems>(own_lines + line * kOwnUnits, task.own.lines, first_own, lines, line);
  // Begins to copy the next line: of a tile of others those for the exponents, and then those for the sums.
  int ahead_tile = begin, ahead_line = 0;
  const auto copy_next = [&](int stage) {
    if (ahead_tile < end) {
      const bool for_sums = ahead_line >= lines;
      const int line = for_sums ? first_line + ahead_line - lines : ahead_line;
      const int64_t first = int64_t(ahead_tile) * kSliceOthers;
      copy_lines<kSliceOthers>(stages + stage * kSliceUnits, task.other.lines, first, lines, line);
      if (!resident && !for_sums)
        copy_lines<kOwnItems>(own_lines + stage * kOwnUnits, task.own.lines, first_own, lines, line);
      if (ahead_line == 0 && int(threadIdx.x) < kSliceOthers)
        __pipeline_memcpy_async(tile_terms + ahead_tile % 2 * kSliceOthers + threadIdx.x,
                                task.other.terms + first + threadIdx.x, sizeof(ItemTerms));
      if (++ahead_line == lines + slice_lines) ahead_line = 0, ++ahead_tile;
    }
    __pipeline_commit();  // an empty group, where nothing is left to copy
  };
#pragma unroll
  for (int ahead = 0; ahead < kSliceStages - 1; ++ahead) copy_next(ahead);
  int stage = kSliceStages - 1;  // of the line that is worked on
  const auto next_line = [&] {
    __pipeline_wait_prior(kSliceStages - 2);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the line before any more
    copy_next(stage);
    stage = (stage + 1) & (kSliceStages - 1);
  };

  float sums[2 * kSliceSteps][4] = {}, total[2] = {}, max[2] = {Limits<float>::kLowest, Limits<float>::kLowest};
  for (int tile = begin; tile < end; ++tile) {
    const ItemTerms* terms = tile_terms + tile % 2 * kSliceOthers + lane % 4 * 2;
    float b[kSliceOthers / 8][4] = {};
#pragma unroll 1
    for (int line = 0; line < lines; ++line) {
      next_line();
      const uint4 *others = stages + stage * kSliceUnits, *own = own_lines + (resident ? line : stage) * kOwnUnits;
#pragma unroll 1
      for (int step = 0; step < kLineSteps; ++step) {
        if (line * kLineSteps + step >= steps) break;
        uint32_t x[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) load_as_rows(x[part], own, warp * 16, 4 * part + 2 * step);
        add_products<kOwnAreRows>(b, x, others, 2 * step);
      }
    }
    scale_products<kOwnAreRows>(b, task.own.terms + lane_own, terms);
    if constexpr (!kOwnAreRows) add_rows(b, terms, task.limit);
    leave_out_excluded<kOwnAreRows>(b, task, lane_own, tile * kSliceOthers + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float shrink;
      if (!is_raised<kOwnAreRows>(max[half], shrink, half, b, terms)) continue;
      total[half] *= shrink;
      shrink_sums(sums, half, shrink);
    }
    uint32_t weights[kSliceOthers / 16][kParts][4];
    const unsigned active = make_weights<kOwnAreRows, kParts>(weights, total, b, max, terms, task);
#pragma unroll
    for (int line = 0; line < kSliceLines; ++line) {
      if (line * kLineSteps >= slice_steps) break;
      next_line();
      if (!active) continue;
#pragma unroll
      for (int step = 0; step < kLineSteps; ++step) {
        const int n = line * kLineSteps + step;
        if (n >= slice_steps) break;
        add_weighted<false>(sums[2 * n], sums[2 * n + 1], stages + stage * kSliceUnits, 2 * step, weights, active);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t to = int64_t(split) * task.own.count + lane_own + 8 * half;
    const float sum = quad_sum(total[half]);
    if (slice == 0 && lane % 4 == 0) task.reference[to] = reference_below(max[half]), task.total[to] = sum;
    const int first = slice * kSliceSteps * kStep;
    if (task.sums) store_sums(task.sums + to * task.columns + first, sums, half, task.columns - first);
  }
}

}  // namespace

template <int kParts, bool kOwnAreRows>
void launch_sliced_sums(const SumsTask& task, Stream stream) {
  const bool resident = sliced_shared_bytes(true, task.shape.lines) <= largest_shared_bytes();
  launch(stream, task.own.count / kOwnItems, int64_t(task.splits) * task.slices, kThreads,
         size_t(sliced_shared_bytes(resident, task.shape.lines)), sliced_sums<kParts, kOwnAreRows>, task, resident);
}

template void launch_sliced_sums<1, false>(const SumsTask&, Stream);
template void launch_sliced_sums<1, true>(const SumsTask&, Stream);
template void launch_sliced_sums<2, false>(const SumsTask&, Stream);
template void launch_sliced_sums<2, true>(const SumsTask&, Stream);

}  // namespace fastvae::cuda
