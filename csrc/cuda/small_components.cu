// Small problems, the gradients of the components, in one launch:
//
//   dmu_kd = v_kd sum_m w u      dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)      dlog w_k = sum_m w
//
// with w_mk = g_m exp(a_mk - l_m), u = z_md - mu_kd and v = 1 / sigma_kd^2.  A block owns one component or a few, and
// goes through all rows twice.  At first a thread has a row, whose weights w it puts into shared memory; then it has a
// dimension.
#include "../common/skipping.h"
#include "small.cuh"

namespace fastvae::cuda {
namespace {

template <class T>
struct Task {
  Mixture<T> mix;
  Gradients<T> wanted;
  double uniform_log_weight;
  T log_negligible;  // of the skipping rule
  T* dlogvar;        // [K, D], also where logvar is shared
};

template <class T, int kOwn>
struct Shared {
  ItemStage<T, 1> stages[kItemStages];
  alignas(16) T mu[kOwn][kSmallDimensions];
  alignas(16) T s[kOwn][kSmallDimensions];  // at first logvar
  alignas(16) T weights[kSmallRows][kOwn];
  T c[kOwn];
  T wu[kThreads][kOwn], wuu[kThreads][kOwn], w[kThreads][kOwn];  // the sums of each slice of the rows
};
static_assert(sizeof(Shared<float, Tile<float>::kVector>) <= 99 * 1024);
static_assert(sizeof(Shared<double, Tile<double>::kVector>) <= 99 * 1024);

// Fetches the components from `first` on into shared memory, padded with zeros to whole vectors; an absent one is
// zeros.
template <class T, int kOwn>
__device__ __forceinline__ void fetch_components(const Task<T>& task, int64_t first, Shared<T, kOwn>& shared) {
  const Mixture<T>& mix = task.mix;
  constexpr int kVector = Tile<T>::kVector;
  const int D = int(mix.D), padded = (D + kVector - 1) / kVector * kVector;
  for (int i = int(threadIdx.x); i < kOwn * padded; i += kThreads) {
    const int own = i / padded, d = i % padded;
    const bool inside = d < D && first + own < mix.K;
    const T mu = inside ? mix.mu[(first + own) * D + d] : T(0);
    const T logvar = inside ? mix.logvar[(mix.shared ? 0 : first + own) * D + d] : T(0);
    const bool present = is_present(mix, first + own);  // the loads of mu and logvar need not wait for it
    shared.mu[own][d] = present ? mu : T(0);
    shared.s[own][d] = present ? logvar : T(0);
  }
  __syncthreads();
  if (int(threadIdx.x) < kOwn) {
    const int own = int(threadIdx.x);
    CompensatedSum<T> logvar_sum;
    for (int d = 0; d < padded; d += kVector)
      logvar_sum.add(sum_of(*reinterpret_cast<const Vector<T>*>(&shared.s[own][d])));
    shared.c[own] = is_present(mix, first + own) ? max_exponent(mix, task.uniform_log_weight, first + own, logvar_sum)
                                                 : T(-INFINITY);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kOwn * padded; i += kThreads) {
    T& s = shared.s[i / padded][i % padded];
    s = T(exp(T(-0.5) * bounded(s)));
  }
}

template <class T, bool kVectors, int kOwn>
__global__ void __launch_bounds__(kThreads, 2) small_components(Task<T> task) {
  Shared<T, kOwn>& shared = *reinterpret_cast<Shared<T, kOwn>*>(shared_memory);
  const Mixture<T>& mix = task.mix;
  const Gradients<T>& wanted = task.wanted;
  const int M = int(mix.M), D = int(mix.D);
  const int64_t first = int64_t(blockIdx.x) * kOwn;
  ItemStream<kVectors, T, 1> rows(shared.stages, {{mix.z}, {mix.D}, M, D});
  fetch_components(task, first, shared);

  SumOfSquares<T> q[kOwn];
  const auto add = [&](int d, const Vector<T>(&z)[1]) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      q[own].begin(d);
      const Vector<T> mu = *reinterpret_cast<const Vector<T>*>(&shared.mu[own][d]);
      const Vector<T> s = *reinterpret_cast<const Vector<T>*>(&shared.s[own][d]);
#pragma unroll
      for (int i = 0; i < Tile<T>::kVector; ++i) {
        const T t = (z[0].x[i] - mu.x[i]) * s.x[i];
        q[own].add(t);
      }
    }
  };
  const auto finish = [&](int m) {
    const T log_prob = wanted.log_prob[m], upstream = upstream_gradient(wanted.grad, wanted.negated, m);
    const bool has_density = log_prob != T(-INFINITY);
    const T grad = has_density ? upstream : T(0);
    const T limit = wanted.dense ? T(-INFINITY) : log_prob + task.log_negligible;
    const int64_t excluded = mix.exclude ? mix.exclude[m] : -1;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const T c = shared.c[own], a = T(fma(q[own].total(), T(-0.5), c));
      const bool left_out = !has_density || c == T(-INFINITY) || first + own == excluded || a < limit;
      shared.weights[m][own] = left_out ? T(0) : grad * exp_term(a - log_prob);
      q[own] = {};
    }
  };
  rows.run(add, finish);

  __syncthreads();
  for (int begin = 0; begin < D; begin += kThreads) {
    const Slices slices(begin, D);
    T logvar[kOwn];  // is used at the end, and on its way until then
#pragma unroll
    for (int own = 0; own < kOwn; ++own)
      logvar[own] = first + own < mix.K ? mix.logvar[(mix.shared ? 0 : first + own) * D + slices.d] : T(0);
    T wu[kOwn] = {}, wuu[kOwn] = {}, w_sum[kOwn] = {};
    if (slices.index < slices.count) {
#pragma unroll 4
      for (int m = slices.index; m < M; m += slices.count) {
        const T z = mix.z[m * D + slices.d];
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          const T w = shared.weights[m][own];
          if (w == T(0)) continue;  // of a row of density zero, z may be infinite
          const T u = z - shared.mu[own][slices.d], product = w * u;
          w_sum[own] += w;
          wu[own] += product;
          wuu[own] = T(fma(product, u, wuu[own]));
        }
      }
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      shared.wu[threadIdx.x][own] = wu[own];
      shared.wuu[threadIdx.x][own] = wuu[own];
      shared.w[threadIdx.x][own] = w_sum[own];
    }
    __syncthreads();
    if (slices.index == 0) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const int64_t k = first + own;
        T all_wu = 0, all_wuu = 0, all_w = 0;
        for (int i = int(threadIdx.x); i < slices.count * slices.width; i += slices.width) {
          all_wu += shared.wu[i][own];
          all_wuu += shared.wuu[i][own];
          all_w += shared.w[i][own];
        }
        if (k >= mix.K) continue;
        const int64_t to = k * D + slices.d;
        const T v = shared.c[own] == T(-INFINITY) ? T(0) : T(exp(-bounded(logvar[own])));
        if (wanted.dmu) wanted.dmu[to] = v * all_wu;
        if (task.dlogvar) task.dlogvar[to] = T(0.5) * T(fma(v, all_wuu, -all_w));
        if (wanted.dweights && slices.d == 0) wanted.dweights[k] = all_w;
      }
    }
    __syncthreads();
  }
}

template <class T>
void launch_components(const Task<T>& task, Stream stream) {
  const Mixture<T>& mix = task.mix;
  const bool vectors = mix.D % Tile<T>::kVector == 0 && aligned(mix.z);
  constexpr int several = Tile<T>::kVector;
  if (small_own<T>(mix.K) == 1)
    launch(stream, mix.K, 1, kThreads, sizeof(Shared<T, 1>),
           vectors ? small_components<T, true, 1> : small_components<T, false, 1>, task);
  else
    launch(stream, blocks_for(mix.K, several), 1, kThreads, sizeof(Shared<T, several>),
           vectors ? small_components<T, true, several> : small_components<T, false, several>, task);
}

}  // namespace

template <class T>
void small_backward_components(const Mixture<T>& mix, const Gradients<T>& wanted, T* dlogvar, Stream stream) {
  launch_components<T>({mix, wanted, -std::log(double(mix.K)), log_negligible<T>(mix.K), dlogvar}, stream);
}

template void small_backward_components<float>(const Mixture<float>&, const Gradients<float>&, float*, Stream);
template void small_backward_components<double>(const Mixture<double>&, const Gradients<double>&, double*, Stream);

}  // namespace fastvae::cuda
