// log p(z) = logsumexp_k a_mk for large problems: kernels, plan and launch.
//
// logsumexp is online: for each of its rows a thread keeps the largest a and the sum over all tiles, and the threads of
// a row merge theirs once, at the end.  A thread needs these numbers once a tile, so they lie in shared memory and
// leave the registers to the squares.  Where the components are split, a second kernel merges the splits, in order.
#include "tile.cuh"

namespace fastvae::cuda {
namespace {

// Dimensions of a stage: with 16 of them a block takes 66 KiB of shared memory, so that two blocks run at a time.
constexpr int kForwardDepth = 16;

template <class T>
struct Shared {
  Stage<T, kForwardDepth> stages[2];
  T max[Tile<T>::kOwn][kThreads], total[Tile<T>::kOwn][kThreads];
  LogSum<T> halves[2][Tile<T>::kSide];  // of each row, at the end
};
static_assert(sizeof(Shared<float>) <= 99 * 1024 && sizeof(Shared<double>) <= 99 * 1024);

// partial [splits, M]; null where there is one split, which writes log_prob itself.
template <class Earlier, class T>
__device__ __forceinline__ void row_tile_forward(const Mixture<T>& mix, const Packed<T>& packed, int splits,
                                                 LogSum<T>* partial, T* log_prob) {
  using Shape = Tile<T>;
  if (is_off(packed.only_if)) return;
  const int row_tile = int(blockIdx.x), split = int(blockIdx.y);
  const int begin = part_begin(packed.panels, splits, split), end = part_begin(packed.panels, splits, split + 1);
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(shared_memory);
  for (int r = 0; r < Shape::kOwn; ++r) {
    shared.max[r][threadIdx.x] = Limits<T>::kLowest;
    shared.total[r][threadIdx.x] = T(0);
  }
  const auto add = [&](int, int panel, Squares<T>& a) {
    exponents(packed, mix, row_tile, panel, a);
#pragma unroll
    for (int r = 0; r < Shape::kOwn; ++r) {
      const T before = shared.max[r][threadIdx.x];
      T max = before;
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) max = T(fmax(max, a[r][c]));
      T total = shared.total[r][threadIdx.x] * exp_term(before - max);
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) total += exp_term(a[r][c] - max);
      shared.max[r][threadIdx.x] = max;
      shared.total[r][threadIdx.x] = total;
    }
  };
  for_each_tile(shared.stages, Earlier{}, packed, {row_tile, begin, 0}, 0, 1, end - begin, add);

  // The 16 threads of a row are 8 lanes in each of two neighbouring warps.
#pragma unroll 1
  for (int r = 0; r < Shape::kOwn; ++r) {
    const LogSum<T> sum = merge_across(LogSum<T>{shared.max[r][threadIdx.x], shared.total[r][threadIdx.x]}, 8);
    const ThreadPosition position;
    if (position.column % 8 == 0) shared.halves[position.column / 8][tile_index<T>(position.row, r)] = sum;
  }
  __syncthreads();
  const int64_t m = int64_t(row_tile) * Shape::kSide + threadIdx.x;
  if (int(threadIdx.x) >= Shape::kSide || m >= mix.M) return;
  LogSum<T> sum = shared.halves[0][threadIdx.x];
  sum.merge(shared.halves[1][threadIdx.x]);
  if (partial)
    partial[int64_t(split) * mix.M + m] = sum;
  else
    log_prob[m] = sum.log();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(Mixture<T> mix, Packed<T> packed, int splits, LogSum<T>* partial, T* log_prob) {
  row_tile_forward<NoEarlierBlocks>(mix, packed, splits, partial, log_prob);
}

// For D > kBlock: a thread has twice as many sums, and a multiprocessor runs one block at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_wide(Mixture<T> mix, Packed<T> packed, int splits, LogSum<T>* partial, T* log_prob) {
  row_tile_forward<EarlierInRegisters<T>>(mix, packed, splits, partial, log_prob);
}

// A warp for each row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_splits(const LogSum<T>* partial, int64_t M, int64_t splits, const int* only_if, T* log_prob) {
  if (is_off(only_if)) return;
  const int64_t m = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  LogSum<T> sum;
  if (m < M)
    for (int64_t i = threadIdx.x % 32; i < splits; i += 32) sum.merge(partial[i * M + m]);
  sum = merge_across(sum, 32);
  if (m < M && threadIdx.x % 32 == 0) log_prob[m] = sum.log();
}

template <class T>
struct ForwardPlan {
  Scratch<T> scratch;
  Packed<T> packed;
  bool wide;
  int64_t splits;
  LogSum<T>* partial;

  ForwardPlan(const Mixture<T>& mix, T* memory) : scratch(memory), packed(mix, scratch, false) {
    wide = packed.depth > kBlock;
    splits = plan_splits(packed.panels, packed.row_tiles, (wide ? 1 : 2) * kMultiprocessors);
    static_assert(sizeof(LogSum<T>) == 2 * sizeof(T));
    partial = reinterpret_cast<LogSum<T>*>(scratch.take(splits > 1 ? 2 * splits * mix.M : 0));
    if (splits == 1) partial = nullptr;
  }
};

// The two forms take the same memory in turn, behind what the product form says of itself.
constexpr int64_t kUncertain = 4;  // numbers

template <class T>
int64_t difference_forward_scratch(const Mixture<T>& mix) {
  return ForwardPlan<T>(mix, nullptr).scratch.size();
}

// In the difference form alone.  only_if: see Packed, or null.
template <class T>
void difference_forward(const Mixture<T>& mix, int* only_if, T* scratch, T* log_prob, Stream stream) {
  ForwardPlan<T> plan(mix, scratch);
  plan.packed.only_if = only_if;
  pack<T>(mix, nullptr, nullptr, plan.packed, stream);
  launch(stream, plan.packed.row_tiles, plan.splits, kThreads, sizeof(Shared<T>),
         plan.wide ? forward_wide<T> : forward<T>, mix, plan.packed, plan.splits, plan.partial, log_prob);
  if (plan.partial)
    launch(stream, blocks_for(mix.M, kThreads / 32), 1, kThreads, 0, merge_splits<T>, plan.partial, mix.M, plan.splits,
           plan.packed.only_if, log_prob);
}

}  // namespace

template <class T>
int64_t forward_scratch(const Mixture<T>& mix) {
  int64_t size = difference_forward_scratch(mix);
  if constexpr (sizeof(T) == 4)
    if (is_certificate_tried(mix)) size = std::max(size, certified_forward_scratch(mix));
  return kUncertain + size;
}

template <class T>
void mixture_forward(const Mixture<T>& mix, T* scratch, T* log_prob, Stream stream) {
  int* only_if = nullptr;
  if constexpr (sizeof(T) == 4) {
    if (is_certificate_tried(mix)) {
      int* uncertain = reinterpret_cast<int*>(scratch);
      mixture_certified_forward(mix, uncertain, scratch + kUncertain, log_prob, stream);
      only_if = uncertain;
    }
  }
  difference_forward(mix, only_if, scratch + kUncertain, log_prob, stream);
}

template int64_t forward_scratch<float>(const Mixture<float>&);
template int64_t forward_scratch<double>(const Mixture<double>&);
template void mixture_forward<float>(const Mixture<float>&, float*, float*, Stream);
template void mixture_forward<double>(const Mixture<double>&, double*, double*, Stream);

}  // namespace fastvae::cuda
