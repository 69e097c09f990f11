// Forward and backward of a whole call on the CPU: the tasks, and how their results are merged.
//
// Each split of the components has partial results for every row: references and totals, or parts of dz.  Each group of
// rows has parts of the parameters' gradients.  All are merged after the tasks, in order: the same bits, whatever the
// number of threads.
#pragma once

#include "mixture_plan.h"

namespace fastvae {

// log p(z) of a row, from the partial results of its splits, which lie `stride` apart.  Each split's sums, times its
// scale, are relative to the total; scale may be null.
template <class T>
T merge(const Partial<T>* partial, int64_t splits, int64_t stride, double* scale) {
  double reference = partial[0].reference, total = 0;
  for (int64_t i = 1; i < splits; ++i) reference = std::max(reference, double(partial[i * stride].reference));
  for (int64_t i = 0; i < splits; ++i) {
    const double shrink = std::exp(double(partial[i * stride].reference) - reference);
    total += partial[i * stride].total * shrink;
    if (scale) scale[i] = shrink;
  }
  if (scale)
    for (int64_t i = 0; i < splits; ++i) scale[i] = total == 0 ? 0.0 : scale[i] / total;
  return T(reference + std::log(total));
}

// For each row a lower bound of l, if the components are in order: an exponent of the components near the row's tile.
template <class T>
std::vector<T> lower_bounds(const Kernels<T>& kernels, const Prepared<T>& prepared, const Rows<T>& rows, int64_t M) {
  const Mixture<T>& mixture = prepared.mixture;
  if (!mixture.order) return {};
  std::vector<T> bounds(static_cast<size_t>(M));
  const int64_t scratch_bytes = kernels.mixture_scratch(mixture.D, mixture.shared);
  run_pieces(M, kTileRows, [&](int64_t begin, int64_t end) {
    const int64_t near = prepared.index_near(rows.z + (begin + end) / 2 * mixture.D);
    const int64_t first = std::clamp<int64_t>(near - kPanel / 2, 0, mixture.K - 1);
    Partial<T> partial[kTileRows];
    const Range range = {begin, end, first, std::min(mixture.K, first + 2 * kPanel)};
    kernels.mixture_forward(
        {mixture, rows.z, rows.exclude, range, nullptr, partial, nullptr, {}, thread_scratch(scratch_bytes)});
    for (int64_t i = begin; i < end; ++i) bounds[i] = partial[i - begin].reference;
  });
  return bounds;
}

template <class T>
void forward(const Kernels<T>& kernels, const Prepared<T>& prepared, const Rows<T>& rows, int64_t M, T* log_prob,
             T* score, const Exponents<T>& exponents) {
  const Mixture<T>& mixture = prepared.mixture;
  const int64_t D = mixture.D;
  const int64_t row_bytes = int64_t(sizeof(Partial<T>)) + (score ? D * int64_t(sizeof(T)) : 0);
  Plan p = plan(M, mixture.K, D, row_bytes, kForwardSplits, true);
  // Groups of rows only give further threads work; they change no row's result.
  const int64_t threads = torch::stable::get_num_threads();
  p.groups = std::clamp<int64_t>(2 * threads / p.splits, 1, p.groups);
  const int64_t slab = std::min(M, p.slab);
  std::vector<Partial<T>> partial(size_t(p.splits * slab));                           // [splits, slab]
  std::unique_ptr<T[]> scores(score ? new T[size_t(p.splits * slab * D)] : nullptr);  // [splits, slab, D]
  const int64_t scratch_bytes = kernels.mixture_scratch(D, mixture.shared);
  const std::vector<T> bounds = lower_bounds(kernels, prepared, rows, M);

  for (int64_t begin = 0; begin < M; begin += slab) {
    const int64_t count = std::min(slab, M - begin);
    run_tasks(p.groups * p.splits, [&](int64_t task) {
      const Range range = range_of(p, begin, begin + count, mixture.K, task);
      const int64_t at = task % p.splits * slab + range.row_begin - begin;
      kernels.mixture_forward({mixture, rows.z, rows.exclude, range,
                               bounds.empty() ? nullptr : bounds.data() + range.row_begin, partial.data() + at,
                               score ? scores.get() + at * D : nullptr, exponents, thread_scratch(scratch_bytes)});
    });
    run_pieces(count, std::max<int64_t>(16, count / 64), [&](int64_t first, int64_t end) {
      double scale[kForwardSplits];
      for (int64_t r = first; r < end; ++r) {
        const int64_t row = rows[begin + r];
        log_prob[row] = merge<T>(partial.data() + r, p.splits, slab, score ? scale : nullptr);
        if (!score) continue;
        T* out = score + row * D;
        std::fill(out, out + D, T(0));
        for (int64_t i = 0; i < p.splits; ++i) {
          const T* part = scores.get() + (i * slab + r) * D;
          for (int64_t d = 0; d < D; ++d) out[d] -= T(scale[i]) * part[d];
        }
      }
    });
  }
}

// Where the gradients go; null where not asked for.
template <class T>
struct Gradients {
  T *dz, *dmu, *dlogvar, *dweights;
};

// out[i] = parts[0][i] + parts[1][i] + ..., in that order; the parts lie `stride` apart.
template <class T>
void sum_parts(T* out, const T* parts, int64_t count, int64_t stride, int64_t n) {
  std::copy_n(parts, n, out);
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < n; ++i) out[i] += parts[part * stride + i];
}

// The same by tasks; nothing where `out` is null, or there are no parts.
template <class T>
void sum_parts(T* out, const T* parts, int64_t count, int64_t n) {
  if (!out || !count) return;
  run_pieces(n, 4096,
             [&](int64_t begin, int64_t end) { sum_parts(out + begin, parts + begin, count, n, end - begin); });
}

template <class T>
void backward(const Kernels<T>& kernels, Backward<T> job, const Rows<T>& rows, int64_t M, Gradients<T> out) {
  const int64_t K = job.mixture.K, D = job.mixture.D;
  const bool shared = job.mixture.shared;
  const Plan p = plan(M, K, D, D * int64_t(sizeof(T)), kBackwardSplits, false);
  const int64_t slab = std::min(M, p.slab), scratch_bytes = kernels.mixture_scratch(D, shared);
  const auto zeros = [](bool wanted, int64_t n) { return std::vector<T>(size_t(wanted ? n : 0)); };

  // With one group of rows the parameters' gradients go to the output itself.  A shared logvar's gradient is summed
  // over the components too, so that each task has a part of it.
  const int64_t parts = p.groups > 1 ? p.groups : 0, shared_parts = p.groups * p.splits;
  std::vector<T> dz = zeros(out.dz, p.splits * slab * D);
  std::vector<T> dmu = zeros(out.dmu, parts * K * D);
  std::vector<T> dlogvar = zeros(out.dlogvar, shared ? shared_parts * D : parts * K * D);
  std::vector<T> dweights = zeros(out.dweights, parts * K);

  for (int64_t begin = 0; begin < M; begin += slab) {
    const int64_t count = std::min(slab, M - begin);
    if (begin) std::fill(dz.begin(), dz.end(), T(0));
    run_tasks(p.groups * p.splits, [&](int64_t task) {
      const int64_t group = task / p.splits, split = task % p.splits;
      Backward<T> b = job;
      b.range = range_of(p, begin, begin + count, K, task);
      b.add = begin > 0;
      b.scratch = thread_scratch(scratch_bytes);
      const auto part_of = [&](T* whole, std::vector<T>& own, int64_t row) {
        return whole && parts ? own.data() + group * K * row : whole;
      };
      b.dz = out.dz ? dz.data() + (split * slab + b.range.row_begin - begin) * D : nullptr;
      b.dmu = part_of(out.dmu, dmu, D);
      b.dlogvar = shared && out.dlogvar ? dlogvar.data() + task * D : part_of(out.dlogvar, dlogvar, D);
      b.dweights = part_of(out.dweights, dweights, 1);
      kernels.mixture_backward(b);
    });
    if (!out.dz) continue;
    run_pieces(count, std::max<int64_t>(16, count / 64), [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r)
        sum_parts(out.dz + rows[begin + r] * D, dz.data() + r * D, p.splits, slab * D, D);
    });
  }
  sum_parts(out.dmu, dmu.data(), parts, K * D);
  sum_parts(out.dlogvar, dlogvar.data(), shared ? shared_parts : parts, shared ? D : K * D);
  sum_parts(out.dweights, dweights.data(), parts, K);
}

}  // namespace fastvae
