// mixture_log_prob, its score and its gradients on the CPU: checks, tasks, merging, registration.
//
// A task is a range of rows by a range of components.  Splits of the components are merged afterwards (their maxima
// and sums, or their parts of dz); groups of rows each have their own parts of the parameters' gradients.  Where a cut
// changes the order of a sum it depends on the shapes alone, and merging goes in order: the same input gives the same
// bits, whatever the threads.
#include <cmath>

#include "host.h"

namespace fastvae {
namespace {

constexpr int64_t kMergeBytes = 32 << 20;  // what splits may hold before they are merged

// Splits of the components at most.  Few in forward: in each a row has to find its largest terms anew before it can
// leave others out.
constexpr int64_t kForwardSplits = 8, kBackwardSplits = 64;

struct Plan {
  int64_t slab;    // rows worked on at a time
  int64_t groups;  // of a slab's rows
  int64_t splits;  // of the components
};

// Components are split first, since then each is packed once; rows as well where there are few components.
// row_bytes is what a split holds for each row until it is merged.
Plan plan(int64_t M, int64_t K, int64_t D, int64_t row_bytes, int64_t most_splits) {
  const int64_t pairs = std::max<int64_t>(1, M) * K;
  const int64_t elements = pairs > (int64_t(1) << 60) / D ? int64_t(1) << 60 : pairs * D;
  // 2^18 elements take some tens of microseconds, 2^24 some milliseconds
  const int64_t tasks = std::clamp<int64_t>(elements >> 24, std::clamp<int64_t>(elements >> 18, 1, 16), 64);
  Plan p;
  p.splits = std::clamp<int64_t>(K / 64, 1, std::min(tasks, most_splits));
  p.slab = std::max<int64_t>(256, kMergeBytes / (p.splits * row_bytes));
  p.groups = std::clamp<int64_t>(std::min(M, p.slab) / 64, 1, tasks / p.splits);
  return p;
}

int64_t cut(int64_t n, int64_t parts, int64_t i) { return n / parts * i + std::min(i, n % parts); }

// The same by whole blocks: rows of a tile, components of a panel.
int64_t cut(int64_t n, int64_t block, int64_t parts, int64_t i) {
  return std::min(n, block * cut((n + block - 1) / block, parts, i));
}

Range range_of(const Plan& p, int64_t row_begin, int64_t row_end, int64_t K, int64_t task) {
  constexpr int64_t kTileRows = 8, kPanel = 32;  // of the widest instruction set
  const int64_t rows = row_end - row_begin, group = task / p.splits, split = task % p.splits;
  return {row_begin + cut(rows, kTileRows, p.groups, group), row_begin + cut(rows, kTileRows, p.groups, group + 1),
          cut(K, kPanel, p.splits, split), cut(K, kPanel, p.splits, split + 1)};
}

// A mixture, and what is found out about it before the kernels run.
template <class T>
struct Prepared {
  Mixture<T> mixture;
  std::vector<int32_t> place;
  std::vector<T> widest;

  Prepared(const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights, bool gradient_in_z) {
    const int64_t K = mu.size(0), D = mu.size(1);
    mixture = {input<T>(mu), input<T>(logvar), input<T>(log_weights), K, D, logvar.size(0) != K, nullptr, nullptr};
    order_dimensions();
    mixture.place = place.data();
    if (gradient_in_z) {
      find_widest();
      mixture.widest = widest.data();
    }
  }

 private:
  bool absent(int64_t k) const { return mixture.log_weights && mixture.log_weights[k] == T(-INFINITY); }
  const T* logvar_of(int64_t k) const { return mixture.logvar + (mixture.shared ? 0 : k * mixture.D); }

  // Dimensions that tell components apart best, by the variance of their means over their variances, come first, so
  // that a tile which does not matter is known early.  A sample of the components decides; any order is right.
  void order_dimensions() {
    const int64_t K = mixture.K, D = mixture.D, step = std::max<int64_t>(1, K / 128);
    std::vector<double> sum(D), square(D), logvar(D), telling(D);
    int64_t count = 0;
    for (int64_t k = 0; k < K; k += step) {
      if (absent(k)) continue;
      ++count;
      for (int64_t d = 0; d < D; ++d) {
        const double m = mixture.mu[k * D + d];
        sum[d] += m;
        square[d] += m * m;
        logvar[d] += logvar_of(k)[d];
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      telling[d] = std::log(square[d] - sum[d] * sum[d] / count) - logvar[d] / count;
      if (std::isnan(telling[d])) telling[d] = -INFINITY;
    }
    std::vector<int32_t> order(D);
    place.resize(D);
    for (int64_t d = 0; d < D; ++d) order[d] = int32_t(d);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return telling[a] > telling[b]; });
    for (int64_t i = 0; i < D; ++i) place[order[i]] = int32_t(i);
  }

  void find_widest() {
    const int64_t D = mixture.D, rows = mixture.shared ? 1 : mixture.K, parts = std::clamp<int64_t>(rows / 1024, 1, 64);
    widest.assign(parts * D, T(-INFINITY));
    run_tasks(parts, [&](int64_t part) {
      T* most = widest.data() + part * D;
      for (int64_t k = cut(rows, parts, part); k < cut(rows, parts, part + 1); ++k) {
        if (!mixture.shared && absent(k)) continue;
        const T* logvar = mixture.logvar + k * D;
        for (int64_t d = 0; d < D; ++d) most[d] = logvar[d] > most[d] ? logvar[d] : most[d];
      }
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t d = 0; d < D; ++d) widest[d] = std::max(widest[d], widest[part * D + d]);
  }
};

void check(const Tensor& z, const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights,
           const std::optional<Tensor>& exclude) {
  check_floats({&z, &mu, &logvar, log_weights ? &*log_weights : &z});
  const int64_t K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(z.dim() == 2 && z.size(1) == D && K > 0 && D > 0, "fastvae: want z [M, D] and mu [K, D]");
  STD_TORCH_CHECK((logvar.size(0) == K || logvar.size(0) == 1) && logvar.size(1) == D, "fastvae: want logvar [K or 1, D]");
  STD_TORCH_CHECK(!log_weights || log_weights->numel() == K, "fastvae: want log_weights [K]");
  STD_TORCH_CHECK(!exclude || (exclude->scalar_type() == ScalarType::Long && exclude->is_contiguous() &&
                               exclude->numel() == z.size(0)),
                  "fastvae: want contiguous int64 exclude [M]");
}

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

template <class T>
void forward(const Kernels<T>& kernels, const Mixture<T>& mixture, const T* z, const int64_t* exclude, int64_t M,
             T* log_prob, T* score) {
  const int64_t D = mixture.D;
  Plan p = plan(M, mixture.K, D, int64_t(sizeof(Partial<T>)) + (score ? D * int64_t(sizeof(T)) : 0), kForwardSplits);
  // Groups of rows only give further threads work; they change no row's result.
  const int64_t threads = torch::stable::get_num_threads();
  p.groups = std::clamp<int64_t>(2 * threads / p.splits, 1, p.groups);
  const int64_t slab = std::min(M, p.slab);
  std::vector<Partial<T>> partial(size_t(p.splits * slab));                        // [splits, slab]
  std::unique_ptr<T[]> scores(score ? new T[size_t(p.splits * slab * D)] : nullptr);  // [splits, slab, D]
  const int64_t scratch_bytes = kernels.mixture_scratch(D);

  for (int64_t begin = 0; begin < M; begin += slab) {
    const int64_t rows = std::min(slab, M - begin);
    run_tasks(p.groups * p.splits, [&](int64_t task) {
      const Range range = range_of(p, begin, begin + rows, mixture.K, task);
      const int64_t at = task % p.splits * slab + range.row_begin - begin;
      kernels.mixture_forward({mixture, z, exclude, range, partial.data() + at, score ? scores.get() + at * D : nullptr,
                               thread_scratch(scratch_bytes)});
    });
    const int64_t piece = std::max<int64_t>(16, rows / 64);
    run_tasks((rows + piece - 1) / piece, [&](int64_t task) {
      double scale[kForwardSplits];
      for (int64_t r = task * piece; r < std::min(rows, (task + 1) * piece); ++r) {
        log_prob[begin + r] = merge<T>(partial.data() + r, p.splits, slab, score ? scale : nullptr);
        if (!score) continue;
        T* out = score + (begin + r) * D;
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

// out[i] += parts[0][i] + parts[1][i] + ..., in that order; the parts lie one after the other.
template <class T>
void add_parts(T* out, const T* parts, int64_t count, int64_t n) {
  if (!out || !count) return;
  const int64_t piece = 4096;
  run_tasks((n + piece - 1) / piece, [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * piece);
    for (int64_t part = 0; part < count; ++part)
      for (int64_t i = task * piece; i < end; ++i) out[i] += parts[part * n + i];
  });
}

template <class T>
void backward(const Kernels<T>& kernels, Backward<T> job, int64_t M, Gradients<T> out) {
  const int64_t K = job.mixture.K, D = job.mixture.D;
  const bool shared = job.mixture.shared;
  const Plan p = plan(M, K, D, D * int64_t(sizeof(T)), kBackwardSplits);
  const int64_t slab = std::min(M, p.slab), scratch_bytes = kernels.mixture_scratch(D);
  const auto zeros = [](bool wanted, int64_t n) { return std::vector<T>(size_t(wanted ? n : 0)); };

  // With one group of rows the parameters' gradients are added to the output itself.  A shared logvar's are summed over
  // the components too, so each task has its own.
  const int64_t parts = p.groups > 1 ? p.groups : 0, shared_parts = p.groups * p.splits;
  std::vector<T> dz = zeros(out.dz, p.splits * slab * D);
  std::vector<T> dmu = zeros(out.dmu, parts * K * D);
  std::vector<T> dlogvar = zeros(out.dlogvar, shared ? shared_parts * D : parts * K * D);
  std::vector<T> dweights = zeros(out.dweights, parts * K);

  for (int64_t begin = 0; begin < M; begin += slab) {
    const int64_t rows = std::min(slab, M - begin);
    std::fill(dz.begin(), dz.end(), T(0));
    run_tasks(p.groups * p.splits, [&](int64_t task) {
      const int64_t group = task / p.splits, split = task % p.splits;
      Backward<T> b = job;
      b.range = range_of(p, begin, begin + rows, K, task);
      b.scratch = thread_scratch(scratch_bytes);
      const auto part_of = [&](T* whole, std::vector<T>& own, int64_t row) {
        return !whole ? nullptr : (parts ? own.data() + group * K * row : whole) + b.range.component_begin * row;
      };
      b.dz = out.dz ? dz.data() + (split * rows + b.range.row_begin - begin) * D : nullptr;
      b.dmu = part_of(out.dmu, dmu, D);
      b.dlogvar = shared && out.dlogvar ? dlogvar.data() + task * D : part_of(out.dlogvar, dlogvar, D);
      b.dweights = part_of(out.dweights, dweights, 1);
      kernels.mixture_backward(b);
    });
    add_parts(out.dz ? out.dz + begin * D : nullptr, dz.data(), p.splits, rows * D);
  }
  add_parts(out.dmu, dmu.data(), parts, K * D);
  add_parts(out.dlogvar, dlogvar.data(), shared ? shared_parts : parts, shared ? D : K * D);
  add_parts(out.dweights, dweights.data(), parts, K);
}

Tensor mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                        const std::optional<Tensor>& log_weights, const std::optional<Tensor>& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = empty(z, {M});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, false);
    forward<T>(kernels, prepared.mixture, input<T>(z), input<int64_t>(exclude), M, output<T>(log_prob), nullptr);
  });
  return log_prob;
}

std::tuple<Tensor, Tensor> mixture_log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const std::optional<Tensor>& log_weights,
                                                      const std::optional<Tensor>& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = empty(z, {M}), score = torch::stable::empty_like(z);
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, true);
    forward<T>(kernels, prepared.mixture, input<T>(z), input<int64_t>(exclude), M, output<T>(log_prob),
               output<T>(score));
  });
  return {log_prob, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward(
    const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu, const Tensor& logvar,
    const std::optional<Tensor>& log_weights, const std::optional<Tensor>& exclude, bool dense, bool need_z,
    bool need_mu, bool need_logvar, bool need_log_weights) {
  check(z, mu, logvar, log_weights, exclude);
  check_floats({&z, &grad, &log_prob});
  const int64_t M = z.size(0), K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M && log_prob.numel() == M, "fastvae: want grad and log_prob [M]");
  const auto wanted = [&](bool need, std::vector<int64_t> size) {
    return torch::stable::new_zeros(z, need ? size : std::vector<int64_t>{0});
  };
  Tensor dz = wanted(need_z, {M, D}), dmu = wanted(need_mu, {K, D}),
         dlogvar = wanted(need_logvar, {logvar.size(0), D}), dweights = wanted(need_log_weights, {K});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, need_z);
    Backward<T> job{};
    job.mixture = prepared.mixture;
    job.z = input<T>(z);
    job.exclude = input<int64_t>(exclude);
    job.log_prob = input<T>(log_prob);
    job.grad = input<T>(grad);
    job.dense = dense;
    backward<T>(kernels, job, M,
                {need_z ? output<T>(dz) : nullptr, need_mu ? output<T>(dmu) : nullptr,
                 need_logvar ? output<T>(dlogvar) : nullptr, need_log_weights ? output<T>(dweights) : nullptr});
  });
  return {dz, dmu, dlogvar, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  m.impl("mixture_log_prob", TORCH_BOX(&mixture_log_prob));
  m.impl("mixture_log_prob_and_score", TORCH_BOX(&mixture_log_prob_and_score));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&mixture_log_prob_backward));
}

}  // namespace fastvae
