// Packs rows and components for the tiled kernels, as plan.h says.  These kernels do O((M + K) D) work.
#include "tile.cuh"

namespace fastvae::cuda {
namespace {

// Packs a tile of rows.  A row of density zero (log_prob, which backward has, is -inf) has no gradient.  It is packed
// as zeros, since an infinite coordinate times a weight of zero would be NaN.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_rows(Mixture<T> mix, const T* log_prob, Packed<T> packed) {
  if (is_off(packed.only_if)) return;
  constexpr int side = Tile<T>::kSide;
  const int64_t first = int64_t(blockIdx.x) * side;
  const auto number = [&](int row, int d) {
    const int64_t m = first + row;
    const bool has_number = m < mix.M && d < mix.D && !(log_prob && log_prob[m] == T(-INFINITY));
    return has_number ? mix.z[m * mix.D + d] : T(0);
  };
  for (int i = int(threadIdx.x); i < side * packed.depth; i += kThreads)
    packed.rows[first * packed.depth + i] = number(i % side, i / side);
  if (!packed.z) return;
  for (int i = int(threadIdx.x); i < side * packed.width; i += kThreads)
    packed.z[first * packed.width + i] = number(i / packed.width, i % packed.width);
}

// The largest of a value over the threads of a block.
template <class T>
__device__ T block_max(T x, T* shared) {
  for (int step = 16; step > 0; step /= 2) x = T(fmax(x, __shfl_xor_sync(0xFFFFFFFFu, x, step)));
  __syncthreads();  // all threads have read the values of the last call
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) x = T(fmax(x, shared[warp]));
  return x;
}

// Packs a panel of components, a thread for each.  uniform_log_weight is -log K.
//
// The short form t = fma(z, s, -mu s) rounds mu s.  With u the unit roundoff, this moves t by u |mu| s, and the sum of
// t^2 / 2 over D by u |t| |mu s| in 2-norms.  The other roundings of a may reach
// u (2 |t|^2 + (1 + sqrt D) (|t|^2 / 2 + 0.9 D)), which is at least 1.3 u |t| D.  So where |mu s| <= D the short form's
// error is within that of the other roundings.  Where |mu s| is larger for any component of a panel, the panel takes
// the difference form, t = (z - mu) s.
template <class T>
__global__ void __launch_bounds__(Tile<T>::kSide)
    pack_components(Mixture<T> mix, double uniform_log_weight, const T* max_logvar, Packed<T> packed) {
  if (is_off(packed.only_if)) return;
  constexpr int side = Tile<T>::kSide;
  T* shared = reinterpret_cast<T*>(shared_memory);
  const int64_t panel = blockIdx.x, first = panel * side, k = first + threadIdx.x;
  const bool present = is_present(mix, k);

  CompensatedSum<T> logvar_sum;
  T squared_norm = 0, max_logvar_difference = 0;  // |mu s|^2; how far max_logvar is above logvar
  for (int d = 0; d < mix.D && present; ++d) {
    const T lv = logvar_of(mix, k, d), scaled = mix.mu[k * mix.D + d] * T(exp(T(-0.5) * bounded(lv)));
    logvar_sum.add(lv);
    squared_norm = T(fma(scaled, scaled, squared_norm));
    if (max_logvar) max_logvar_difference = T(fmax(max_logvar_difference, max_logvar[d] - lv));
  }
  const double log_weight = !present ? 0.0 : mix.log_weights ? double(mix.log_weights[k]) : uniform_log_weight;
  const double log_determinant = total_of(logvar_sum.sum, logvar_sum.compensation);
  const T c = present ? T(log_weight - 0.5 * (log_determinant + double(mix.D) * kLog2Pi)) : T(-INFINITY);
  packed.c[k] = c;
  const bool beyond = !(squared_norm <= T(mix.D) * T(mix.D));  // also where it is NaN
  const bool difference_form = block_max(T(beyond), shared) != T(0);
  if (threadIdx.x == 0) packed.difference_form[panel] = T(difference_form);
  if (packed.panel_max) {
    const T max_c = block_max(c, shared), max_log_sigma_ratio = block_max(max_logvar_difference * T(0.5), shared);
    if (threadIdx.x == 0) {
      packed.panel_max[2 * panel] = max_c;
      packed.panel_max[2 * panel + 1] = max_log_sigma_ratio;
    }
  }

  T* components = packed.components + first * packed.depth * 2 + threadIdx.x;
  for (int d = 0; d < packed.depth; ++d) {
    T s = d < mix.D ? T(1) : T(0), b = 0;
    if (present && d < mix.D) {
      const T mu = mix.mu[k * mix.D + d];
      s = T(exp(T(-0.5) * bounded(logvar_of(mix, k, d))));
      b = difference_form ? mu : -mu * s;
    }
    components[(2 * d) * side] = s;
    components[(2 * d + 1) * side] = b;
  }
  if (!packed.mu) return;
  for (int i = int(threadIdx.x); i < side * packed.width; i += side) {
    const int64_t other = first + i / packed.width;
    const int d = i % packed.width;
    const bool has_number = d < mix.D && is_present(mix, other);
    packed.mu[first * packed.width + i] = has_number ? mix.mu[other * mix.D + d] : T(0);
    packed.v[first * packed.width + i] = has_number ? T(exp(-bounded(logvar_of(mix, other, d)))) : T(0);
  }
}

}  // namespace

template <class T>
void pack(const Mixture<T>& mix, const T* log_prob, const T* max_logvar, const Packed<T>& packed, Stream stream) {
  launch(stream, packed.row_tiles, 1, kThreads, 0, pack_rows<T>, mix, log_prob, packed);
  launch(stream, packed.panels, 1, Tile<T>::kSide, 4 * sizeof(T), pack_components<T>, mix, -std::log(double(mix.K)),
         max_logvar, packed);
}

template void pack<float>(const Mixture<float>&, const float*, const float*, const Packed<float>&, Stream);
template void pack<double>(const Mixture<double>&, const double*, const double*, const Packed<double>&, Stream);

}  // namespace fastvae::cuda
