// The mixture density's backward: the gradients in z, mu, logvar and log_weights, of those that are wanted.
#pragma once

#include "mixture_rows.h"

namespace FASTVAE_ISA {

// R rows against the packed chunk; `row` counts from the beginning of the task's range.
template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void backward_rows(const Backward<T>& task, const Scratch<T>& scratch, const Chunk<T>& chunk, int64_t row) {
  const int64_t D = task.mixture.D, m = task.range.row_begin + row;
  const int64_t* exclude = task.exclude ? task.exclude + m : nullptr;
  const T log_negligible = fastvae::log_negligible<T>(task.mixture.K);
  T log_prob[R], limit[R], grad[R];
  for (int r = 0; r < R; ++r) {
    const bool no_density = task.log_prob[m + r] == T(-__builtin_inf());  // and no gradient
    log_prob[r] = no_density ? T(0) : task.log_prob[m + r];
    grad[r] = no_density ? T(0) : task.grad[m + r];
    limit[r] = task.dense ? T(-__builtin_inf()) : limit_of<T>(log_prob[r], log_negligible, task.mixture, chunk);
  }
  transpose_rows<T, R>(task.z + m * D, D, task.mixture.position, scratch.z);

  Tiles<T, R> tiles(scratch, task.mixture, chunk, exclude, m, task.exponents);
  bool any = false;
  while (task.exponents.a ? tiles.find_kept(limit) : tiles.find(limit)) {
    any = true;
    for (int i = 0; i < tiles.count; ++i) {
      const int64_t panel = tiles.panel[i];
      T *tile = tiles.tile(i), *weights = scratch.weights + panel * kPanel<T>, min_term[R];
      for (int r = 0; r < R; ++r) min_term[r] = min_x<T>(limit[r] - scratch.log_sigma_ratio[panel], log_prob[r]);
      Vec<T> sum0 = load<T>(weights), sum1 = load<T>(weights + kWidth<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {  // the exponents become the weights w
        T* a = tile + r * kPanel<T>;
        Vec<T> w[2] = {load<T>(a) - log_prob[r], load<T>(a + kWidth<T>) - log_prob[r]};
        exp_terms<T>(w, min_term[r]);
        w[0] *= grad[r];
        w[1] *= grad[r];
        store<T>(a, w[0]);
        store<T>(a + kWidth<T>, w[1]);
        sum0 += w[0];
        sum1 += w[1];
      }
      store<T>(weights, sum0);
      store<T>(weights + kWidth<T>, sum1);
    }
    if constexpr (DZ || DMU || DLOGVAR) {
      for (int i = 0; i < tiles.count; ++i)
        add_tile_gradients<T, R, DZ, DMU, DLOGVAR>(scratch, tiles.panel[i], D, tiles.tile(i));
    }
  }

  if (DZ && any) add_rows<T, R>(scratch.dz, D, task.mixture.position, T(-2), task.dz + row * D);
}

template <class T, bool DZ, bool DMU, bool DLOGVAR>
struct BackwardRows {
  const Backward<T>& task;
  const Scratch<T>& scratch;
  const Chunk<T>& chunk;
  template <int R>
  void operator()(int64_t row) const {
    backward_rows<T, R, DZ, DMU, DLOGVAR>(task, scratch, chunk, row);
  }
};

template <class T, bool DZ, bool DMU, bool DLOGVAR>
void mixture_backward_as(const Backward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D, task.mixture.shared, true);
  pack_shared(task.mixture, scratch);
  if (DZ) scratch.clear_dz(D);

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const Chunk<T> chunk = pack<T>(task.mixture, k, min(step, task.range.component_end - k), scratch);
    const size_t numbers = size_t(chunk.panels() * kPanel<T>);
    __builtin_memset(scratch.weights, 0, numbers * sizeof(T));
    if (DMU || DLOGVAR) __builtin_memset(scratch.grads, 0, numbers * 2 * D * sizeof(T));
    for_row_tiles(task.mixture, rows, BackwardRows<T, DZ, DMU, DLOGVAR>{task, scratch, chunk});
    unpack_gradients<T>(task, scratch, chunk);
  }
}

template <class T>
void mixture_backward(const Backward<T>& task) {
  using Function = void (*)(const Backward<T>&);
  static const Function by_need[2][2][2] = {
      {{mixture_backward_as<T, false, false, false>, mixture_backward_as<T, false, false, true>},
       {mixture_backward_as<T, false, true, false>, mixture_backward_as<T, false, true, true>}},
      {{mixture_backward_as<T, true, false, false>, mixture_backward_as<T, true, false, true>},
       {mixture_backward_as<T, true, true, false>, mixture_backward_as<T, true, true, true>}},
  };
  by_need[task.dz != nullptr][task.dmu != nullptr][task.dlogvar != nullptr](task);
}

}  // namespace FASTVAE_ISA
