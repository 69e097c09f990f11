// The gradients of log p(z): which kernels run, in which order, and how their scratch memory is laid out.
#include "mixture_backward.cuh"
#include "reductions.cuh"
#include "screen.h"

namespace fastvae::cuda {
namespace {

// The kernel for D dimensions: 16 lanes share them in the second pass, and each has as few as they allow.
template <Side kSide, class T>
auto backward_kernel(int64_t D) {
  return D <= 32 ? backward<kSide, T, 2> : D <= 48 ? backward<kSide, T, 3> : backward<kSide, T, 4>;
}

template <class T>
struct BackwardPlan {
  Scratch<T> scratch;
  Packed<T> packed;
  T* early;                // what the screen and products need, in the memory of `packed`, which is filled later
  Gradients<T> certified;  // those for which products are tried
  // On the device; null where products are not tried.  Which tiles the difference form has to compute, and whether any.
  Repeated repeated;
  int* some_repeated = nullptr;
  bool log_sigma_ratios;  // the limits need them; where logvar is shared all are 0
  int tiles;              // of components
  int chunks_z, splits_z, chunks_parameters, splits_parameters;
  int64_t summed;                    // rows of the matrix whose columns add up to a shared logvar's gradient
  T *dz, *dmu, *dlogvar, *dweights;  // of all splits; null where there is one, which writes the gradient itself
  T *max_logvar, *columns;           // [D]; scratch memory of sum_columns and max_columns

  BackwardPlan(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory)
      : scratch(memory), packed(mix, scratch, true), early(memory) {
    const int chunks = int(blocks_for(mix.D, kChunk));
    const bool shared = mix.shared && wanted.dlogvar;
    certified = certified_of(mix, wanted);
    log_sigma_ratios = wanted.dz && !mix.shared && !wanted.dense;
    chunks_z = chunks;
    tiles = component_tiles(mix);
    splits_z = plan_splits(tiles, packed.row_tiles * chunks, 2 * kMultiprocessors);
    chunks_parameters = wanted.dmu || wanted.dlogvar ? chunks : 1;
    splits_parameters = plan_splits(packed.row_tiles, int64_t(tiles) * chunks_parameters, 2 * kMultiprocessors);
    if constexpr (sizeof(T) == 4) {
      static_assert(BackwardTile<Side::rows, T>::kRows == kRepeatedRows);
      static_assert(BackwardTile<Side::components, T>::kComponents == kRepeatedComponents);
      const bool screened = is_screen_tried(mix, wanted);
      const int64_t needed = std::max<int64_t>(screened ? screened_backward_scratch(mix) : 0,
                                               has_any(certified) ? certified_backward_scratch(mix, certified) : 0);
      scratch.take(std::max<int64_t>(0, needed - scratch.size()));
      packed.only_if = reinterpret_cast<int*>(scratch.take(screened));
      some_repeated = reinterpret_cast<int*>(scratch.take(has_any(certified)));
      repeated.rows = reinterpret_cast<int*>(scratch.take(certified.dz ? packed.row_tiles : 0));
      repeated.components = reinterpret_cast<int*>(scratch.take(has_parameters(certified) ? tiles : 0));
    }
    const auto take = [&](const T* gradient, int64_t splits, int64_t n) {
      return gradient && splits > 1 ? scratch.take(splits * n) : nullptr;
    };
    summed = splits_parameters * mix.K;
    dz = take(wanted.dz, splits_z, mix.M * mix.D);
    dmu = take(wanted.dmu, splits_parameters, mix.K * mix.D);
    dlogvar = shared ? scratch.take(summed * mix.D) : take(wanted.dlogvar, splits_parameters, mix.K * mix.D);
    dweights = take(wanted.dweights, splits_parameters, mix.K);
    max_logvar = scratch.take(log_sigma_ratios ? mix.D : 0);
    const int64_t rows = shared ? summed : log_sigma_ratios ? mix.K : 0;
    columns = scratch.take(columns_scratch(rows, mix.D));
  }
};

template <class T>
void tiled_backward(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory, Stream stream) {
  if (!has_any(wanted)) return;
  const BackwardPlan<T> plan(mix, wanted, memory);
  Packed<T> packed = plan.packed;
  const int64_t largest = std::max<int64_t>(packed.row_tiles, packed.panels) * Tile<T>::kSide * 2 * packed.width;
  if (largest / Tile<T>::kVector > UINT32_MAX)  // of an array: the kernels count in 32 bits
    throw std::runtime_error("fastvae: CUDA: too many rows or components for backward");
  T* const dz = plan.dz ? plan.dz : wanted.dz;
  T* const dmu = plan.dmu ? plan.dmu : wanted.dmu;
  T* const dlogvar = plan.dlogvar ? plan.dlogvar : wanted.dlogvar;
  T* const dweights = plan.dweights ? plan.dweights : wanted.dweights;
  int* const not_screened = packed.only_if;
  if constexpr (sizeof(T) == 4) {
    const SplitSums sums{dz, dmu, dlogvar, dweights, plan.splits_z, plan.splits_parameters};
    if (not_screened) mixture_screened_backward(mix, wanted, sums, not_screened, plan.early, stream);
    if (has_any(plan.certified))
      mixture_certified_backward(mix, plan.certified, sums, not_screened, plan.some_repeated, plan.repeated, plan.early,
                                 stream);
  }
  const bool rows_tried = plan.certified.dz, parameters_tried = has_parameters(plan.certified);
  if (rows_tried == bool(wanted.dz) && parameters_tried == has_parameters(wanted)) packed.only_if = plan.some_repeated;
  if (plan.log_sigma_ratios)
    max_columns(mix.logvar, mix.log_weights, mix.K, mix.D, packed.only_if, plan.columns, plan.max_logvar, stream);
  pack<T>(mix, wanted.log_prob, plan.log_sigma_ratios ? plan.max_logvar : nullptr, packed, stream);

  const auto sum = [&](const T* splits, int64_t count, int64_t n, T* out) {
    if (splits) launch(stream, blocks_for(n, kThreads), 1, kThreads, 0, sum_splits<T>, splits, count, n, out);
  };
  BackwardTask<T> task{
      mix, packed, wanted.log_prob, wanted.grad, wanted.negated, wanted.dense, log_negligible<T>(mix.K)};
  if (wanted.dz) {
    if (rows_tried) task.packed.only_if = plan.some_repeated, task.only_tiles = plan.repeated.rows;
    task.splits = plan.splits_z;
    task.dz = dz;
    task.chunks = plan.chunks_z;
    launch(stream, packed.row_tiles, plan.splits_z * plan.chunks_z, kThreads, sizeof(BackwardShared<Side::rows, T>),
           backward_kernel<Side::rows, T>(mix.D), task);
    sum(plan.dz, plan.splits_z, mix.M * mix.D, wanted.dz);
  }
  if (!has_parameters(wanted)) return;
  task.packed.only_if = parameters_tried ? plan.some_repeated : packed.only_if;
  task.only_tiles = plan.repeated.components;
  task.splits = plan.splits_parameters;
  task.dmu = dmu, task.dlogvar = dlogvar, task.dweights = dweights;
  task.chunks = plan.chunks_parameters;
  launch(stream, plan.tiles, plan.splits_parameters * plan.chunks_parameters, kThreads,
         sizeof(BackwardShared<Side::components, T>), backward_kernel<Side::components, T>(mix.D), task);
  sum(plan.dmu, plan.splits_parameters, mix.K * mix.D, wanted.dmu);
  sum(plan.dweights, plan.splits_parameters, mix.K, wanted.dweights);
  if (mix.shared && wanted.dlogvar)
    sum_columns(plan.dlogvar, plan.summed, mix.D, plan.columns, wanted.dlogvar, stream);
  else
    sum(plan.dlogvar, plan.splits_parameters, mix.K * mix.D, wanted.dlogvar);
}

template <class T>
struct SmallPlan {
  Scratch<T> scratch;
  T* dlogvar;  // [K, D]; where logvar is shared, the gradients whose sum is wanted
  T* columns;  // scratch memory of sum_columns

  SmallPlan(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory) : scratch(memory) {
    const bool shared = mix.shared && wanted.dlogvar;
    dlogvar = shared ? scratch.take(mix.K * mix.D) : wanted.dlogvar;
    columns = scratch.take(shared ? columns_scratch(mix.K, mix.D) : 0);
  }
};

template <class T>
void small_backward(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory, Stream stream) {
  const SmallPlan<T> plan(mix, wanted, memory);
  if (wanted.dz) small_backward_rows(mix, wanted, stream);
  if (!has_parameters(wanted)) return;
  small_backward_components(mix, wanted, plan.dlogvar, stream);
  if (mix.shared && wanted.dlogvar) sum_columns(plan.dlogvar, mix.K, mix.D, plan.columns, wanted.dlogvar, stream);
}

}  // namespace

template <class T>
int64_t backward_scratch(const Mixture<T>& mix, const Gradients<T>& wanted) {
  if (is_small(mix.M, mix.K, mix.D)) return SmallPlan<T>(mix, wanted, nullptr).scratch.size();
  return BackwardPlan<T>(mix, wanted, nullptr).scratch.size();
}

template <class T>
void mixture_backward(const Mixture<T>& mix, const Gradients<T>& wanted, T* scratch, Stream stream) {
  if (is_small(mix.M, mix.K, mix.D)) return small_backward(mix, wanted, scratch, stream);
  tiled_backward(mix, wanted, scratch, stream);
}

template int64_t backward_scratch<float>(const Mixture<float>&, const Gradients<float>&);
template int64_t backward_scratch<double>(const Mixture<double>&, const Gradients<double>&);
template void mixture_backward<float>(const Mixture<float>&, const Gradients<float>&, float*, Stream);
template void mixture_backward<double>(const Mixture<double>&, const Gradients<double>&, double*, Stream);

}  // namespace fastvae::cuda
