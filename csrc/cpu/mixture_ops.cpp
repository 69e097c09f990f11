// mixture_log_prob, its score and its gradients on the CPU: checks, the run of the tasks, merging, registration.
//
// Splits of the components are merged after the tasks (their maxima and sums, or their parts of dz); groups of rows
// each have their own parts of the parameters' gradients.  Merging goes in order, so that it gives the same bits whatever
// the threads.
#include "mixture_plan.h"
#include "operators.h"

namespace fastvae {
namespace {

// The partial results of a row's splits, stride apart: log p(z), and for each split what its sums are to be multiplied
// by to be relative to the total, into scale (null: not wanted).
template <class T>
T merge(const Partial<T>* partial, int64_t splits, int64_t stride, double* scale) {
  double top = partial[0].top, total = 0;
  for (int64_t i = 1; i < splits; ++i) top = std::max(top, double(partial[i * stride].top));
  for (int64_t i = 0; i < splits; ++i) {
    const double shrink = std::exp(double(partial[i * stride].top) - top);
    total += partial[i * stride].total * shrink;
    if (scale) scale[i] = shrink;
  }
  if (scale)
    for (int64_t i = 0; i < splits; ++i) scale[i] = total == 0 ? 0.0 : scale[i] / total;
  return T(top + std::log(total));
}

// For each row a term that is large, if the components are in order: of the components around the place of its tile.
template <class T>
std::vector<T> large_terms(const Kernels<T>& kernels, const Prepared<T>& prepared, const Rows<T>& rows, int64_t M) {
  const Mixture<T>& mixture = prepared.mixture;
  if (!mixture.order) return {};
  std::vector<T> terms(static_cast<size_t>(M));
  const int64_t scratch_bytes = kernels.mixture_scratch(mixture.D, mixture.shared);
  run_pieces(M, kTileRows, [&](int64_t begin, int64_t end) {
    const int64_t place = prepared.place_near(rows.z + (begin + end) / 2 * mixture.D);
    const int64_t first = std::clamp<int64_t>(place - kPanel / 2, 0, mixture.K - 1);
    Partial<T> partial[kTileRows];
    kernels.mixture_forward({mixture, rows.z, rows.exclude, {begin, end, first, std::min(mixture.K, first + 2 * kPanel)},
                             nullptr, partial, nullptr, {}, thread_scratch(scratch_bytes)});
    for (int64_t i = begin; i < end; ++i) terms[i] = partial[i - begin].top;
  });
  return terms;
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
  std::vector<Partial<T>> partial(size_t(p.splits * slab));                        // [splits, slab]
  std::unique_ptr<T[]> scores(score ? new T[size_t(p.splits * slab * D)] : nullptr);  // [splits, slab, D]
  const int64_t scratch_bytes = kernels.mixture_scratch(D, mixture.shared);
  const std::vector<T> known = large_terms(kernels, prepared, rows, M);

  for (int64_t begin = 0; begin < M; begin += slab) {
    const int64_t count = std::min(slab, M - begin);
    run_tasks(p.groups * p.splits, [&](int64_t task) {
      const Range range = range_of(p, begin, begin + count, mixture.K, task);
      const int64_t at = task % p.splits * slab + range.row_begin - begin;
      kernels.mixture_forward({mixture, rows.z, rows.exclude, range,
                               known.empty() ? nullptr : known.data() + range.row_begin, partial.data() + at,
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

// Where the gradients go: dz, dmu, dlogvar, dlog_weights; null where not asked for.
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

// The same of what may not be wanted, by tasks.
template <class T>
void sum_parts(T* out, const T* parts, int64_t count, int64_t n) {
  if (!out || !count) return;
  run_pieces(n, 4096, [&](int64_t begin, int64_t end) {
    sum_parts(out + begin, parts + begin, count, n, end - begin);
  });
}

template <class T>
void backward(const Kernels<T>& kernels, Backward<T> job, const Rows<T>& rows, int64_t M, Gradients<T> out) {
  const int64_t K = job.mixture.K, D = job.mixture.D;
  const bool shared = job.mixture.shared;
  const Plan p = plan(M, K, D, D * int64_t(sizeof(T)), kBackwardSplits, false);
  const int64_t slab = std::min(M, p.slab), scratch_bytes = kernels.mixture_scratch(D, shared);
  const auto zeros = [](bool wanted, int64_t n) { return std::vector<T>(size_t(wanted ? n : 0)); };

  // With one group of rows the parameters' gradients go to the output itself.  A shared logvar's are summed over the
  // components too, so each task has its own.
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

}  // namespace

Tensor mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                        const OptionalTensor& log_weights, const OptionalTensor& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = new_result(z, {M});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, false, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), nullptr, {});
  });
  return log_prob;
}

std::tuple<Tensor, Tensor> mixture_log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const OptionalTensor& log_weights,
                                                      const OptionalTensor& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = new_result(z, {M}), score = new_result(z, {M, z.size(1)});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, true, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), output<T>(score), {});
  });
  return {log_prob, score};
}

// What is kept of a row, as fastvae/operators.py has it: exponents by whole panels, and with each 16 of them room for one
// number, which holds which tiles matter; these come after all exponents.
int64_t kept_stride(int64_t K) { return (K + kMaxPanel - 1) / kMaxPanel * kMaxPanel; }
int64_t kept_numbers(int64_t K) { return kept_stride(K) / 16 * 17; }

template <class T>
Exponents<T> exponents_in(const Tensor& kept, int64_t M, int64_t K) {
  static_assert(kMinPanel * sizeof(T) >= 16);  // room for a byte a tile
  T* a = output<T>(kept);
  return {a, reinterpret_cast<uint8_t*>(a + M * kept_stride(K)), kept_stride(K)};
}

std::tuple<Tensor, Tensor> mixture_log_prob_and_exponents(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                          const OptionalTensor& log_weights,
                                                          const OptionalTensor& exclude, bool need_z) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0), K = mu.size(0);
  Tensor log_prob = new_result(z, {M}), kept = new_result(z, {M, kept_numbers(K)});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, need_z, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), nullptr, exponents_in<T>(kept, M, K));
  });
  return {log_prob, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from(
    const OptionalTensor& exponents, const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z,
    bool need_mu, bool need_logvar, bool need_log_weights) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  check_floats({&z, &grad, &log_prob, exponents ? &*exponents : &z});
  STD_TORCH_CHECK(!exponents || (!dense && exponents->numel() == z.size(0) * kept_numbers(mu.size(0))),
                  "fastvae: want what mixture_log_prob_and_exponents kept");
  const int64_t M = z.size(0), K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M && log_prob.numel() == M, "fastvae: want grad and log_prob [M]");
  const auto wanted = [&](bool need, std::vector<int64_t> size) {
    if (!need) size = {0};
    return M ? new_result(z, size) : torch::stable::new_zeros(z, size);
  };
  Tensor dz = wanted(need_z, {M, D}), dmu = wanted(need_mu, {K, D}),
         dlogvar = wanted(need_logvar, {logvar.size(0), D}), dweights = wanted(need_log_weights, {K});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, need_z, dense);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    std::vector<T> log_prob_memory, grad_memory;
    Backward<T> job{};
    job.mixture = prepared.mixture;
    job.z = rows.z;
    job.exclude = rows.exclude;
    job.log_prob = rows.reordered(input<T>(log_prob), log_prob_memory);
    job.grad = rows.reordered(input<T>(grad), grad_memory);
    if (exponents) job.exponents = exponents_in<T>(*exponents, M, K);
    job.dense = dense;
    backward<T>(kernels, job, rows, M,
                {need_z ? output<T>(dz) : nullptr, need_mu ? output<T>(dmu) : nullptr,
                 need_logvar ? output<T>(dlogvar) : nullptr, need_log_weights ? output<T>(dweights) : nullptr});
  });
  return {dz, dmu, dlogvar, dweights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward(
    const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu, const Tensor& logvar,
    const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  return mixture_log_prob_backward_from({}, grad, log_prob, z, mu, logvar, log_weights, exclude, dense, need_z, need_mu,
                                        need_logvar, need_log_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from_exponents(
    const Tensor& grad, const Tensor& log_prob, const Tensor& exponents, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool need_z, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  return mixture_log_prob_backward_from(exponents, grad, log_prob, z, mu, logvar, log_weights, exclude, false, need_z,
                                        need_mu, need_logvar, need_log_weights);
}

FASTVAE_REGISTER(FASTVAE_CPU_LIBRARY, CPU, m) {
  m.impl("mixture_log_prob", TORCH_BOX(&mixture_log_prob));
  m.impl("mixture_log_prob_and_score", TORCH_BOX(&mixture_log_prob_and_score));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&mixture_log_prob_backward));
  m.impl("mixture_log_prob_and_exponents", TORCH_BOX(&mixture_log_prob_and_exponents));
  m.impl("mixture_log_prob_backward_from_exponents", TORCH_BOX(&mixture_log_prob_backward_from_exponents));
}

}  // namespace fastvae
