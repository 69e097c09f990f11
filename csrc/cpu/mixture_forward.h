// The mixture density's forward: an online logsumexp over the components, and with it the score where that is wanted.
//
// Of each row, total = sum_k exp(a - reference) is summed.  The reference is raised where a term exceeds it by much.
#pragma once

#include "mixture_rows.h"

namespace FASTVAE_ISA {

using fastvae::Forward;
using fastvae::Partial;

// Where a row's reference starts: the lowest number, not -inf, because -inf minus -inf is NaN.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

constexpr int kMargin = 4;         // how far an exponent may exceed the reference before that is raised
constexpr int kMaxLaneSum = 1024;  // above a batch's sum in a lane while none does: exp(kMargin) < 64
static_assert(2 * kBatch * 64 <= kMaxLaneSum);

// An exponent of this row exceeds the reference by more than the margin: what was summed so far shrinks to the new one.
template <class T, int R, bool SCORE>
__attribute__((noinline)) void raise_reference(T raised, T* reference, Partial<T>* partial, Vec<T>* total, T* dz,
                                               T* score, int64_t D) {
  const bool first = *reference == kLowest<T>;  // nothing was summed
  const double shrink = first ? 0.0 : __builtin_exp(double(*reference) - double(raised));
  *reference = raised;
  partial->total *= shrink;
  *total *= T(shrink);
  if constexpr (SCORE) {
    for (int64_t d = 0; d < D; ++d) {
      T* sum = dz + d * R * kWidth<T>;
      store<T>(sum, load<T>(sum) * T(shrink));
      score[d] *= T(shrink);
    }
  }
}

// sum[r] = the sum of exp(a - reference[r]) over row r of a batch of tiles.  With SCORE these terms are written over
// their exponents, and those that are left out as zeros.  False if a sum is so large that the reference may be too low.
template <class T, int R, bool SCORE>
FASTVAE_INLINE bool sum_terms(const Tiles<T, R>& tiles, const Scratch<T>& scratch, const T* reference, const T* limit,
                              Vec<T>* sum) {
  Mask<T> small = kEveryLane<T>;
  for (int r = 0; r < R; ++r) {
    Vec<T> sums[2] = {};
    for (int i = 0; i < tiles.count; ++i) {
      T* const a = tiles.tile(i) + r * kPanel<T>;
      Vec<T> x[2] = {load<T>(a) - reference[r], load<T>(a + kWidth<T>) - reference[r]};
      if constexpr (SCORE) {
        exp_terms<T>(x, min_x<T>(limit[r] - scratch.log_sigma_ratio[tiles.panel[i]], reference[r]));
        sums[0] += x[0];
        sums[1] += x[1];
        store<T>(a, x[0]);
        store<T>(a + kWidth<T>, x[1]);
      } else {
        add_exp_terms<T>(x, sums);
      }
    }
    sum[r] = sums[0] + sums[1];
    small = below(sum[r], T(kMaxLaneSum), small);
  }
  return every_lane<T>(small);
}

// R rows against the packed chunk; `row` counts from the beginning of the task's range.
template <class T, int R, bool SCORE>
void forward_rows(const Forward<T>& task, const Scratch<T>& scratch, const Chunk<T>& chunk, int64_t row) {
  const int64_t D = task.mixture.D, m = task.range.row_begin + row;
  const int64_t* exclude = task.exclude ? task.exclude + m : nullptr;
  const T log_negligible = fastvae::log_negligible<T>(task.mixture.K, fastvae::kForwardDigits);
  transpose_rows<T, R>(task.z + m * D, D, task.mixture.position, scratch.z);
  Partial<T>* partial = task.partial + row;
  T* score = task.score + row * D;
  T reference[R], lower_bound[R], limit[R];
  for (int r = 0; r < R; ++r) {
    reference[r] = partial[r].reference;
    lower_bound[r] = task.lower_bound ? task.lower_bound[row + r] : kLowest<T>;
    const T larger = reference[r] > lower_bound[r] ? reference[r] : lower_bound[r];
    limit[r] = limit_of<T>(larger, log_negligible, task.mixture, chunk);
  }
  Vec<T> total[R] = {};

  Tiles<T, R> tiles(scratch, task.mixture, chunk, exclude, m, task.exponents);
  bool any = false, in_range = false;  // in_range: no term can leave the range of exp
  while (tiles.find(limit)) {
    any = true;
    Vec<T> sum[R];
    // Where no term can leave the range of exp, the references are looked at only after a sum that is too large.
    if (SCORE || !in_range || !sum_terms<T, R, SCORE>(tiles, scratch, reference, limit, sum)) {
      in_range = true;
      for (int r = 0; r < R; ++r) {
        const T* a = tiles.tile(0) + r * kPanel<T>;
        Vec<T> largest = broadcast<T>(kLowest<T>);  // a NaN is passed over here, but comes out of exp
        for (int i = 0; i < tiles.count; ++i, a += R * kPanel<T>)
          largest = larger<T>(load<T>(a), larger<T>(load<T>(a + kWidth<T>), largest));
        if (!every_lane<T>(below(largest, reference[r] + kMargin, kEveryLane<T>))) {
          raise_reference<T, R, SCORE>(max<T>(largest), reference + r, partial + r, total + r,
                                       scratch.dz + r * kWidth<T>, score + r * D, D);
          if (!(reference[r] < lower_bound[r]))
            limit[r] = limit_of<T>(reference[r], log_negligible, task.mixture, chunk);
        }
        in_range &= chunk.max_c - reference[r] < Format<T>::kExpLimit - kMargin;
      }
      sum_terms<T, R, SCORE>(tiles, scratch, reference, limit, sum);
    }
    for (int r = 0; r < R; ++r) total[r] += sum[r];
    if constexpr (SCORE) {
      for (int i = 0; i < tiles.count; ++i)
        add_tile_gradients<T, R, true, false, false>(scratch, tiles.panel[i], D, tiles.tile(i));
    }
  }

  if (!any) return;
  for (int r = 0; r < R; ++r) {
    partial[r].reference = reference[r];
    partial[r].total += sum<T>(total[r]);
  }
  if constexpr (SCORE) add_rows<T, R>(scratch.dz, D, task.mixture.position, T(2), score);
}

template <class T, bool SCORE>
struct ForwardRows {
  const Forward<T>& task;
  const Scratch<T>& scratch;
  const Chunk<T>& chunk;
  template <int R>
  void operator()(int64_t row) const {
    forward_rows<T, R, SCORE>(task, scratch, chunk, row);
  }
};

template <class T>
void mixture_forward(const Forward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D, task.mixture.shared, false);
  pack_shared(task.mixture, scratch);
  for (int64_t r = 0; r < rows; ++r) task.partial[r] = {kLowest<T>, 0.0};
  if (task.score) {
    __builtin_memset(task.score, 0, size_t(rows * D) * sizeof(T));
    scratch.clear_dz(D);
  }

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const Chunk<T> chunk = pack<T>(task.mixture, k, min(step, task.range.component_end - k), scratch);
    if (task.score)
      for_row_tiles(task.mixture, rows, ForwardRows<T, true>{task, scratch, chunk});
    else
      for_row_tiles(task.mixture, rows, ForwardRows<T, false>{task, scratch, chunk});
  }
}

}  // namespace FASTVAE_ISA
