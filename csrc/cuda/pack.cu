// Rows and components brought into the order of plan.h.  These kernels do O((M + K) D) work.
#include "tile.cuh"

namespace fastvae::cuda {
namespace {

// A tile of rows.  One whose density is zero (log_prob, in backward, is -inf) has no gradient: it becomes a row of
// zeros, since an infinite coordinate times a weight of zero would be NaN.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_rows(Mixture<T> mix, const T* log_prob, Packed<T> packed) {
  constexpr int side = Tile<T>::kSide;
  const int64_t first = int64_t(blockIdx.x) * side;
  const auto number = [&](int row, int d) {
    const int64_t m = first + row;
    const bool there = m < mix.M && d < mix.D && !(log_prob && log_prob[m] == T(-INFINITY));
    return there ? mix.z[m * mix.D + d] : T(0);
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
  __syncthreads();  // the last call's values were read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) x = T(fmax(x, shared[warp]));
  return x;
}

// A panel of components, a thread each.  `uniform` is -log K; `widest` [D], or null: the largest logvar of any component.
//
// t = fma(z, s, -mu s) rounds mu s, which moves t by u |mu| s, u the unit roundoff, and t^2 / 2 summed over D by
// u |t| |mu s| in the 2-norms.  The other roundings of a may reach u (2 |t|^2 + (1 + sqrt D) (|t|^2 / 2 + 0.9 D)), which
// is at least 1.3 u |t| D: so where |mu s| <= D that shorter form costs no more accuracy than there is to lose, and
// where it is larger for any component of a panel, the panel takes the difference first.
template <class T>
__global__ void __launch_bounds__(Tile<T>::kSide) pack_components(Mixture<T> mix, double uniform, const T* widest,
                                                                  Packed<T> packed) {
  constexpr int side = Tile<T>::kSide;
  T* shared = reinterpret_cast<T*>(shared_memory);
  const int64_t panel = blockIdx.x, first = panel * side, k = first + threadIdx.x;
  const auto present = [&](int64_t k) { return k < mix.K && !(mix.log_weights && mix.log_weights[k] == T(-INFINITY)); };
  const auto logvar = [&](int64_t k, int d) { return mix.logvar[(mix.shared ? 0 : k * mix.D) + d]; };
  const bool there = present(k);

  CompensatedSum<T> logvar_sum;
  T squared = 0, narrow = 0;
  for (int d = 0; d < mix.D && there; ++d) {
    const T lv = logvar(k, d), scaled = mix.mu[k * mix.D + d] * T(exp(T(-0.5) * bounded(lv)));
    logvar_sum.add(lv);
    squared = T(fma(scaled, scaled, squared));
    if (widest) narrow = T(fmax(narrow, widest[d] - lv));
  }
  const double log_w = !there ? 0.0 : mix.log_weights ? double(mix.log_weights[k]) : uniform;
  const double log_determinant = total_of(logvar_sum.sum, logvar_sum.compensation);
  const T c = there ? T(log_w - 0.5 * (log_determinant + double(mix.D) * kLog2Pi)) : T(-INFINITY);
  packed.c[k] = c;
  const bool far = !(squared <= T(mix.D) * T(mix.D));  // also where it is NaN
  const bool difference = block_max(T(far), shared) != T(0);
  if (threadIdx.x == 0) packed.difference[panel] = T(difference);
  if (packed.extremes) {
    const T largest = block_max(c, shared), steep = block_max(narrow * T(0.5), shared);
    if (threadIdx.x == 0) {
      packed.extremes[2 * panel] = largest;
      packed.extremes[2 * panel + 1] = steep;
    }
  }

  T* pairs = packed.pairs + first * packed.depth * 2 + threadIdx.x;
  for (int d = 0; d < packed.depth; ++d) {
    T s = d < mix.D ? T(1) : T(0), b = 0;
    if (there && d < mix.D) {
      const T mu = mix.mu[k * mix.D + d];
      s = T(exp(T(-0.5) * bounded(logvar(k, d))));
      b = difference ? mu : -mu * s;
    }
    pairs[(2 * d) * side] = s;
    pairs[(2 * d + 1) * side] = b;
  }
  if (!packed.mu) return;
  for (int i = int(threadIdx.x); i < side * packed.width; i += side) {
    const int64_t other = first + i / packed.width;
    const int d = i % packed.width;
    const bool real = d < mix.D && present(other);
    packed.mu[first * packed.width + i] = real ? mix.mu[other * mix.D + d] : T(0);
    packed.v[first * packed.width + i] = real ? T(exp(-bounded(logvar(other, d)))) : T(0);
  }
}

}  // namespace

template <class T>
void pack(const Mixture<T>& mix, const T* log_prob, const T* widest, const Packed<T>& packed, Stream stream) {
  launch(stream, packed.row_tiles, 1, kThreads, 0, pack_rows<T>, mix, log_prob, packed);
  launch(stream, packed.panels, 1, Tile<T>::kSide, 4 * sizeof(T), pack_components<T>, mix,
         -std::log(double(mix.K)), widest, packed);
}

template void pack<float>(const Mixture<float>&, const float*, const float*, const Packed<float>&, Stream);
template void pack<double>(const Mixture<double>&, const double*, const double*, const Packed<double>&, Stream);

}  // namespace fastvae::cuda
