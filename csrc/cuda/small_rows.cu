// Small problems, log p of the rows and its gradient in z, in one launch:
//
//   l_m = logsumexp_k a_mk      dz_md = -sum_k w_mk u v      with u = z_md - mu_kd, v = 1 / sigma_kd^2
//
// The launch also draws z, where z is to be drawn.  A block owns one row or a few, and goes through all components:
// once for log p, and once more for the gradient.  At first a thread has a component, whose exponentials it makes and
// whose weights w it puts into shared memory; then it has a dimension.  Nothing is packed, and no second launch has to
// merge results.
#include "small.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
struct Task {
  Mixture<T> mix;
  Sample<T> sample;  // its z is null where z is given
  double uniform_log_weight;
  const T *log_prob, *grad;  // log p(z) and its upstream gradient, in backward; in forward null
  bool negated;
  T *kl_out, *log_prob_out, *dz_out;  // null where they are not wanted
};

template <class T, int kOwn>
struct Shared {
  ItemStage<T, 2> stages[kItemStages];
  alignas(16) T z[kOwn][kSmallDimensions];
  alignas(16) T weights[kSmallComponents][kOwn];  // a, then w
  LogSum<T> sums[kThreads / 32][kOwn];
  T log_q[kOwn], log_prob[kOwn];
  T parts[kThreads][kOwn];  // of dz: the sums of each slice of the components
};
static_assert(sizeof(Shared<float, Tile<float>::kVector>) <= 99 * 1024);
static_assert(sizeof(Shared<double, Tile<double>::kVector>) <= 99 * 1024);

// Draws or fetches the rows from `first` on into shared memory, padded with zeros to whole vectors.
template <class T, int kOwn>
__device__ __forceinline__ void fetch_rows(const Task<T>& task, int64_t first, Shared<T, kOwn>& shared) {
  const int D = int(task.mix.D), padded = (D + Tile<T>::kVector - 1) / Tile<T>::kVector * Tile<T>::kVector;
  const bool drawn = task.sample.z;
  for (int i = int(threadIdx.x); i < kOwn * padded; i += kThreads) {
    const int r = i / padded, d = i % padded;
    const bool has_number = first + r < task.mix.M && d < D;
    if (!has_number || !drawn) shared.z[r][d] = has_number ? task.mix.z[(first + r) * D + d] : T(0);
  }
  if (!drawn) return;
  const int group = group_width(D), r = int(threadIdx.x) / group, lane = int(threadIdx.x) % group;
  const bool inside = r < kOwn && first + r < task.mix.M;
  const T log_q = draw_row<false>(task.sample, inside, first + r, lane, group, [&](int d, const T(&z)[4]) {
    for (int j = 0; j < 4; ++j)
      if (d + j < D) shared.z[r][d + j] = z[j];
  });
  if (inside && lane == 0) shared.log_q[r] = log_q;
}

// Merges the sums of all threads, always in one order, and writes log p and kl.
template <class T, int kOwn>
__device__ __forceinline__ void finish_log_prob(const Task<T>& task, int64_t first, const LogSum<T> (&sums)[kOwn],
                                                Shared<T, kOwn>& shared) {
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const LogSum<T> of_warp = merge_across(sums[r], 32);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32][r] = of_warp;
  }
  __syncthreads();
  const int r = int(threadIdx.x);
  if (r >= kOwn || first + r >= task.mix.M) return;
  LogSum<T> sum = shared.sums[0][r];
  for (int warp = 1; warp < kThreads / 32; ++warp) sum.merge(shared.sums[warp][r]);
  const T log_prob = sum.log();
  shared.log_prob[r] = log_prob;
  task.log_prob_out[first + r] = log_prob;
  if (task.kl_out) task.kl_out[first + r] = shared.log_q[r] - log_prob;
}

// The exponents a become the weights w; all are 0 for a row past the end, or of density zero.
template <class T, int kOwn>
__device__ __forceinline__ void weigh(const Task<T>& task, int64_t first, Shared<T, kOwn>& shared) {
  T log_prob[kOwn], grad[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t m = first + r;
    log_prob[r] = m >= task.mix.M ? T(-INFINITY) : task.log_prob ? task.log_prob[m] : shared.log_prob[r];
    grad[r] = log_prob[r] == T(-INFINITY) ? T(0) : upstream_gradient(task.grad, task.negated, m);
  }
  for (int k = int(threadIdx.x); k < int(task.mix.K); k += kThreads) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      T& w = shared.weights[k][r];
      w = log_prob[r] == T(-INFINITY) ? T(0) : grad[r] * exp_term(w - log_prob[r]);
    }
  }
}

// The numbers in dimension d of every step-th component from `from` on; past the end, the last component's again.
template <class T>
struct ComponentBatch {
  static constexpr int kSize = 2 * Tile<T>::kVector;
  T mu[kSize], logvar[kSize];

  __device__ __forceinline__ ComponentBatch(const Mixture<T>& mix, int from, int step, int d) {
    const int last = int(mix.K) - 1, D = int(mix.D);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int k = from + i * step < last ? from + i * step : last, at = k * D + d;
      mu[i] = mix.mu[at];
      logvar[i] = mix.logvar[mix.shared ? d : at];
    }
  }
};

// A slice has dozens of components.  To wait for one after the other would take longer than all else in this kernel, so
// a batch is on its way while the one before it is added, and nothing within a batch depends on a branch.
template <class T, int kOwn>
__device__ __forceinline__ void add_gradients(const Task<T>& task, int64_t first, Shared<T, kOwn>& shared) {
  const int K = int(task.mix.K), D = int(task.mix.D);
  for (int begin = 0; begin < D; begin += kThreads) {
    const Slices slices(begin, D);
    T sum[kOwn] = {};
    if (slices.index < slices.count) {
      constexpr int n = ComponentBatch<T>::kSize;
      ComponentBatch<T> next(task.mix, slices.index, slices.count, slices.d);
      for (int first_k = slices.index; first_k < K; first_k += n * slices.count) {
        const ComponentBatch<T> batch = next;
        next = ComponentBatch<T>(task.mix, first_k + n * slices.count, slices.count, slices.d);
        T v[n];
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = T(exp(-bounded(batch.logvar[i])));
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const int k = first_k + i * slices.count;
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const T w = k < K ? shared.weights[k][r] : T(0);  // 0 for a component whose mu may be NaN
            const T more = T(fma(w, (shared.z[r][slices.d] - batch.mu[i]) * v[i], sum[r]));
            sum[r] = w == T(0) ? sum[r] : more;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) shared.parts[threadIdx.x][r] = sum[r];
    __syncthreads();
    if (slices.index == 0) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        T total = 0;
        for (int i = int(threadIdx.x); i < slices.count * slices.width; i += slices.width) total += shared.parts[i][r];
        if (first + r < task.mix.M) task.dz_out[(first + r) * D + slices.d] = -total;
      }
    }
    __syncthreads();
  }
}

template <class T, bool kVectors, int kOwn>
__global__ void __launch_bounds__(kThreads, 2) small_rows(Task<T> task) {
  Shared<T, kOwn>& shared = *reinterpret_cast<Shared<T, kOwn>*>(shared_memory);
  const Mixture<T>& mix = task.mix;
  const int64_t first = int64_t(blockIdx.x) * kOwn;
  ItemStream<kVectors, T, 2> components(
      shared.stages, {{mix.mu, mix.logvar}, {mix.D, mix.shared ? 0 : mix.D}, int(mix.K), int(mix.D)});
  fetch_rows(task, first, shared);

  int excluded[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t component = mix.exclude && first + r < mix.M ? mix.exclude[first + r] : -1;
    excluded[r] = component < mix.K ? int(component) : -1;
  }
  LogSum<T> sums[kOwn];
  SumOfSquares<T> q[kOwn];
  CompensatedSum<T> logvar_sum;
  const auto add = [&](int d, const Vector<T>(&numbers)[2]) {
    const Vector<T>&mu = numbers[0], &logvar = numbers[1];
    Vector<T> s;
#pragma unroll
    for (int i = 0; i < Tile<T>::kVector; ++i) s.x[i] = T(exp(T(-0.5) * bounded(logvar.x[i])));
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const Vector<T> z = *reinterpret_cast<const Vector<T>*>(&shared.z[r][d]);
      q[r].begin(d);
#pragma unroll
      for (int i = 0; i < Tile<T>::kVector; ++i) {
        const T t = (z.x[i] - mu.x[i]) * s.x[i];
        q[r].add(t);
      }
    }
    logvar_sum.add(sum_of(logvar));
  };
  const auto finish = [&](int k) {
    const T c = max_exponent(mix, task.uniform_log_weight, k, logvar_sum);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      // an absent or excluded component may have brought NaN into q
      const T a = c == T(-INFINITY) || k == excluded[r] ? T(-INFINITY) : T(fma(q[r].total(), T(-0.5), c));
      sums[r].merge({a, T(1)});
      shared.weights[k][r] = a;
      q[r] = {};
    }
    logvar_sum = {};
  };
  components.run(add, finish);

  if (!task.log_prob) finish_log_prob(task, first, sums, shared);
  if (!task.dz_out) return;
  __syncthreads();
  weigh(task, first, shared);
  __syncthreads();
  add_gradients(task, first, shared);
}

template <class T>
void launch_rows(const Task<T>& task, Stream stream) {
  const Mixture<T>& mix = task.mix;
  const bool vectors = mix.D % Tile<T>::kVector == 0 && aligned(mix.mu) && aligned(mix.logvar);
  constexpr int several = Tile<T>::kVector;
  if (small_own<T>(mix.M) == 1)
    launch(stream, mix.M, 1, kThreads, sizeof(Shared<T, 1>), vectors ? small_rows<T, true, 1> : small_rows<T, false, 1>,
           task);
  else
    launch(stream, blocks_for(mix.M, several), 1, kThreads, sizeof(Shared<T, several>),
           vectors ? small_rows<T, true, several> : small_rows<T, false, several>, task);
}

}  // namespace

template <class T>
void small_forward(const SmallForward<T>& given, Stream stream) {
  const Sample<T> sample = given.sample ? *given.sample : Sample<T>{};
  launch_rows<T>({given.mix, sample, -std::log(double(given.mix.K)), nullptr, nullptr, false, given.kl, given.log_prob,
                  given.score},
                 stream);
}

template <class T>
void small_backward_rows(const Mixture<T>& mix, const Gradients<T>& wanted, Stream stream) {
  launch_rows<T>(
      {mix, {}, -std::log(double(mix.K)), wanted.log_prob, wanted.grad, wanted.negated, nullptr, nullptr, wanted.dz},
      stream);
}

template void small_forward<float>(const SmallForward<float>&, Stream);
template void small_forward<double>(const SmallForward<double>&, Stream);
template void small_backward_rows<float>(const Mixture<float>&, const Gradients<float>&, Stream);
template void small_backward_rows<double>(const Mixture<double>&, const Gradients<double>&, Stream);

}  // namespace fastvae::cuda
