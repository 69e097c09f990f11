// The gradients of log p(z), with w_mk = g_m exp(a_mk - l_m), u = z_md - mu_kd and v = 1 / sigma_kd^2:
//
//   dz_md = -sum_k w u v    dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)   dlog w_k = sum_m w
//
// One kernel, for two sides: a block owns a tile of rows and goes through the panels of components, for dz; or owns a
// panel and goes through the rows, for the others.  For each tile it computes a again, puts the weights w into shared
// memory, and goes through them a second time with the sums over the other side in registers.  In this second pass a
// warp takes those rows (components) of the other side for which any of its own 16 has a weight, and no others.
//
// What is too small to matter is set to zero before: see docs/developers/cuda-kernels.md.
#include "../common/skipping.h"
#include "tile.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kDepth = 8;  // dimensions of a stage: 92 KiB of shared memory for a block, which all devices can give

enum class Side { rows, components };

template <class T>
struct Shared {
  static constexpr int kLine = Tile<T>::kSide + Tile<T>::kVector;  // no two lines begin in the same bank
  Stage<T, kDepth> stages[2];
  // Of the other side's rows or components, by the block's own; before that, sums of earlier blocks of dimensions.
  T weights[Tile<T>::kSide][kLine];

  __device__ __forceinline__ EarlierInSharedMemory<T> earlier() { return {weights[0]}; }
};
static_assert(sizeof(Shared<float>) <= 99 * 1024 && sizeof(Shared<double>) <= 99 * 1024);

template <class T>
struct Task {
  Mixture<T> mix;
  Packed<T> packed;
  const T *log_prob, *grad;
  bool negated, dense;
  T log_negligible;  // log of what is too small a responsibility
  int splits;        // of the other side
  T* dz;             // [splits, M, D]
  T *dmu, *dlogvar;  // [splits, K, D]
  T* dweights;       // [splits, K]
};

// The limit of a row's exponents: a pair below it is left out.
template <Side kSide, class T>
__device__ T limit_of(const Task<T>& task, T log_prob, T max_c, T max_log_sigma_ratio) {
  if (task.dense) return T(-INFINITY);
  const T limit = log_prob + task.log_negligible;
  if (kSide == Side::components) return limit;
  return limit - log_t_bound(limit, max_c, max_log_sigma_ratio) - max_log_sigma_ratio;
}

// q becomes w.  l is +inf for a row that is padding or has density zero: all its weights are 0.
template <Side kSide, class T>
__device__ __forceinline__ void weigh(const Task<T>& task, int row_tile, int panel, Squares<T>& q) {
  using Shape = Tile<T>;
  const Place at;
  exponents(task.packed, task.mix, row_tile, panel, q);
  const T largest_c = task.packed.extremes[2 * int64_t(panel)], steep = task.packed.extremes[2 * int64_t(panel) + 1];
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
    const int64_t m = int64_t(row_tile) * Shape::kSide + owned<T>(at.row, r);
    const T l = m < task.mix.M ? task.log_prob[m] : T(-INFINITY);
    const bool there = l != T(-INFINITY);
    const T log_prob = there ? l : T(INFINITY);
    const T grad = !there ? T(0) : gradient_at(task.grad, task.negated, m);
    const T limit = limit_of<kSide>(task, log_prob, largest_c, steep);
#pragma unroll
    for (int c = 0; c < Shape::kOwn; ++c) q[r][c] = q[r][c] < limit ? T(0) : grad * exp_term(q[r][c] - log_prob);
  }
}

// weights[other][own] = w.
template <Side kSide, class T>
__device__ __forceinline__ void store_weights(const Squares<T>& w, Shared<T>& shared) {
  using Shape = Tile<T>;
  const Place at;
  const int own = kSide == Side::rows ? at.row : at.column, other = kSide == Side::rows ? at.column : at.row;
#pragma unroll
  for (int j = 0; j < Shape::kOwn; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector<T> piece;
#pragma unroll
      for (int i = 0; i < Shape::kVector; ++i) {
        const int o = half * Shape::kVector + i;
        piece.x[i] = kSide == Side::rows ? w[o][j] : w[j][o];
      }
      *reinterpret_cast<Vector<T>*>(&shared.weights[owned<T>(other, j)][owned<T>(own, half * Shape::kVector)]) = piece;
    }
  }
}

// In the second pass a thread has a few rows (components) of its own by 8 dimensions; 8 lanes share them.
template <class T>
constexpr int kFew = Tile<T>::kSide / (kThreads / 8);  // 4, or 2

template <class T>
__device__ __forceinline__ void load_dimensions(const T* line, T (&out)[8]) {
  constexpr int n = Tile<T>::kVector;
#pragma unroll
  for (int i = 0; i < 8; i += n) {
    const Vector<T> piece = *reinterpret_cast<const Vector<T>*>(line + i);
#pragma unroll
    for (int j = 0; j < n; ++j) out[i + j] = piece.x[j];
  }
}

// What the second pass needs of a component, or a row, of the other side.
template <Side kSide, class T>
struct Line {
  T mu[8], v[8];
  __device__ __forceinline__ Line(const Packed<T>& packed, int64_t k, int d) {
    load_dimensions(packed.mu + k * packed.width + d, mu);
    load_dimensions(packed.v + k * packed.width + d, v);
  }
};

template <class T>
struct Line<Side::components, T> {
  T z[8];
  __device__ __forceinline__ Line(const Packed<T>& packed, int64_t m, int d) {
    load_dimensions(packed.z + m * packed.width + d, z);
  }
};

template <Side kSide, class T>
struct Sums {
  T dz[kFew<T>][8];  // sum_k w u v

  __device__ __forceinline__ void add(const T (&w)[kFew<T>], const T (&z)[kFew<T>][8], const Line<kSide, T>& line) {
#pragma unroll
    for (int o = 0; o < kFew<T>; ++o) {
#pragma unroll
      for (int i = 0; i < 8; ++i) dz[o][i] = T(fma(w[o], (z[o][i] - line.mu[i]) * line.v[i], dz[o][i]));
    }
  }
};

template <class T>
struct Sums<Side::components, T> {
  T wu[kFew<T>][8], wuu[kFew<T>][8], w_sum[kFew<T>];  // over the rows

  __device__ __forceinline__ void add(const T (&w)[kFew<T>], const T (&mu)[kFew<T>][8],
                                      const Line<Side::components, T>& line) {
#pragma unroll
    for (int o = 0; o < kFew<T>; ++o) {
      w_sum[o] += w[o];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const T u = line.z[i] - mu[o][i], product = w[o] * u;
        wu[o][i] += product;
        wuu[o][i] = T(fma(product, u, wuu[o][i]));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void write(const Task<T>& task, const Sums<Side::rows, T>& sums, int64_t m, int o, int d,
                                      int64_t split, bool) {
  if (m >= task.mix.M) return;
  T* out = task.dz + (split * task.mix.M + m) * task.mix.D + d;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (d + i < task.mix.D) out[i] = -sums.dz[o][i];
}

template <class T>
__device__ __forceinline__ void write(const Task<T>& task, const Sums<Side::components, T>& sums, int64_t k, int o,
                                      int d, int64_t split, bool first) {
  if (k >= task.mix.K) return;
  if (first && task.dweights) task.dweights[split * task.mix.K + k] = sums.w_sum[o];
  T v[8];
  load_dimensions(task.packed.v + k * task.packed.width + d, v);
  const int64_t to = (split * task.mix.K + k) * task.mix.D + d;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (d + i >= task.mix.D) continue;
    if (task.dmu) task.dmu[to + i] = v[i] * sums.wu[o][i];
    if (task.dlogvar) task.dlogvar[to + i] = T(0.5) * T(fma(v[i], sums.wuu[o][i], -sums.w_sum[o]));
  }
}

// Blocks: x is the tile of rows, or the panel, that it owns; y counts chunks of dimensions within splits.
template <Side kSide, class T>
__global__ void __launch_bounds__(kThreads, 1) backward(Task<T> task) {
  using Shape = Tile<T>;
  constexpr bool kRows = kSide == Side::rows;
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(shared_memory);
  const Packed<T>& packed = task.packed;
  const int chunks = int(gridDim.y) / task.splits, chunk = int(blockIdx.y) % chunks;
  const int own = int(blockIdx.x), split = int(blockIdx.y) / chunks;
  const int others = kRows ? packed.panels : packed.row_tiles;
  const int begin = cut(others, task.splits, split), end = cut(others, task.splits, split + 1);

  const int lane = int(threadIdx.x) % 32, d = chunk * kChunk + lane % 8 * 8;
  const int few = int(threadIdx.x) / 8 * kFew<T>, of_warp = int(threadIdx.x) / 32 * 4 * kFew<T>;  // its first own
  const bool working = d < packed.width;
  Sums<kSide, T> sums = {};

  const auto add = [&](int row_tile, int panel, Squares<T>& q) {
    weigh<kSide>(task, row_tile, panel, q);
    // The last tile's weights were read before the barrier that this tile's first stage began with; the sums of earlier
    // blocks, which lie in the same memory, have just been read.
    if (packed.depth > kBlock) __syncthreads();
    store_weights<kSide>(q, shared);
    __syncthreads();
    T mine[kFew<T>][8];  // z, or mu
#pragma unroll
    for (int o = 0; o < kFew<T>; ++o) {
      const T* line = (kRows ? packed.z : packed.mu) + (int64_t(own) * Shape::kSide + few + o) * packed.width;
      if (working) load_dimensions(line + d, mine[o]);
    }
    const int64_t other = int64_t(kRows ? panel : row_tile) * Shape::kSide;
    for (int base = 0; base < Shape::kSide; base += 32) {
      bool any = false;
#pragma unroll
      for (int o = 0; o < 4 * kFew<T>; ++o) any |= shared.weights[base + lane][of_warp + o] != T(0);
      unsigned left = __ballot_sync(0xFFFFFFFFu, any);
      if (!left || !working) continue;
      int i = base + __ffs(left) - 1;
      for (Line<kSide, T> line(packed, other + i, d);;) {
        left &= left - 1;
        const int next = left ? base + __ffs(left) - 1 : i;
        const Line<kSide, T> ahead(packed, other + next, d);  // on its way while this one is worked on
        T w[kFew<T>];
#pragma unroll
        for (int o = 0; o < kFew<T>; ++o) w[o] = shared.weights[i][few + o];
        sums.add(w, mine, line);
        if (!left) break;
        line = ahead;
        i = next;
      }
    }
  };
  const Cursor first = kRows ? Cursor{own, begin, 0} : Cursor{begin, own, 0};
  for_each_tile(shared.stages, shared.earlier(), packed, first, kRows ? 0 : 1, kRows ? 1 : 0, end - begin, add);

  if (!working) return;
#pragma unroll
  for (int o = 0; o < kFew<T>; ++o)
    write(task, sums, int64_t(own) * Shape::kSide + few + o, o, d, split, chunk == 0 && lane % 8 == 0);
}

// out[i] = parts[0][i] + parts[1][i] + ..., in that order; the parts lie one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts(const T* parts, int64_t count, int64_t n, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  T sum = 0;
  for (int64_t part = 0; part < count; ++part) sum += parts[part * n + i];
  out[i] = sum;
}

constexpr int64_t kRowsOfAColumn = 512;  // summed, or searched, by one thread

// out[c][d], over rows c kRowsOfAColumn ... of x [rows, D]: their sum, or their largest among the components present.
template <bool kSum, class T>
__global__ void __launch_bounds__(kThreads) reduce_columns(const T* x, const T* log_weights, int64_t rows, int64_t D,
                                                           T* out) {
  const int64_t d = int64_t(blockIdx.y) * kThreads + threadIdx.x, begin = int64_t(blockIdx.x) * kRowsOfAColumn;
  if (d >= D) return;
  T result = kSum ? T(0) : T(-INFINITY);
  for (int64_t k = begin; k < rows && k < begin + kRowsOfAColumn; ++k) {
    if (log_weights && log_weights[k] == T(-INFINITY)) continue;
    result = kSum ? result + x[k * D + d] : T(fmax(result, x[k * D + d]));
  }
  out[blockIdx.x * D + d] = result;
}

// Until one row is left, in `out` [D]; memory [blocks_for(rows, kRowsOfAColumn) * 2, D].
template <bool kSum, class T>
void reduce_all(const T* x, const T* log_weights, int64_t rows, int64_t D, T* memory, T* out, Stream stream) {
  for (T* to = memory; rows > 0;) {
    const int64_t left = blocks_for(rows, kRowsOfAColumn);
    if (left == 1) to = out;
    launch(stream, left, blocks_for(D, kThreads), kThreads, 0, reduce_columns<kSum, T>, x, log_weights, rows, D, to);
    if (left == 1) return;
    x = to, log_weights = nullptr, rows = left, to += left * D;
  }
}

template <class T>
struct BackwardPlan {
  Carve<T> carve;
  Packed<T> packed;
  bool parameters, steepness;
  int chunks_z, splits_z, chunks_parameters, splits_parameters;
  int64_t columns;
  T *dz, *dmu, *dlogvar, *dweights, *widest, *reduced;  // null where the gradient itself is written

  BackwardPlan(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory)
      : carve(memory), packed(mix, carve, true) {
    const int chunks = int(blocks_for(mix.D, kChunk));
    parameters = wanted.dmu || wanted.dlogvar || wanted.dweights;
    steepness = wanted.dz && !mix.shared && !wanted.dense;
    chunks_z = chunks;
    splits_z = plan_splits(packed.panels, packed.row_tiles * chunks, kMultiprocessors);
    chunks_parameters = wanted.dmu || wanted.dlogvar ? chunks : 1;
    splits_parameters = plan_splits(packed.row_tiles, packed.panels * chunks_parameters, kMultiprocessors);
    const auto parts = [&](const T* gradient, int64_t splits, int64_t n) {
      return gradient && splits > 1 ? carve.take(splits * n) : nullptr;
    };
    const bool shared = wanted.dlogvar && mix.shared;
    dz = parts(wanted.dz, splits_z, mix.M * mix.D);
    dmu = parts(wanted.dmu, splits_parameters, mix.K * mix.D);
    dlogvar = shared ? carve.take(splits_parameters * mix.K * mix.D)
                     : parts(wanted.dlogvar, splits_parameters, mix.K * mix.D);
    dweights = parts(wanted.dweights, splits_parameters, mix.K);
    columns = shared ? splits_parameters * mix.K : mix.K;
    widest = carve.take(steepness ? mix.D : 0);
    reduced = carve.take(steepness || shared ? 2 * blocks_for(columns, kRowsOfAColumn) * mix.D : 0);
  }
};

// Without tiles; where logvar is shared its gradient is the sum of those of the components.
template <class T>
struct SmallPlan {
  Carve<T> carve;
  bool parameters;
  T *dlogvar, *reduced;

  SmallPlan(const Mixture<T>& mix, const Gradients<T>& wanted, T* memory) : carve(memory) {
    const bool shared = mix.shared && wanted.dlogvar;
    parameters = wanted.dmu || wanted.dlogvar || wanted.dweights;
    dlogvar = shared ? carve.take(mix.K * mix.D) : wanted.dlogvar;
    reduced = carve.take(shared ? 2 * blocks_for(mix.K, kRowsOfAColumn) * mix.D : 0);
  }
};

template <class T>
void small_backward(const Mixture<T>& mix, const Gradients<T>& wanted, T* scratch, Stream stream) {
  const SmallPlan<T> plan(mix, wanted, scratch);
  if (wanted.dz) small_backward_rows(mix, wanted, stream);
  if (!plan.parameters) return;
  small_backward_components(mix, wanted, plan.dlogvar, stream);
  if (mix.shared && wanted.dlogvar)
    reduce_all<true, T>(plan.dlogvar, nullptr, mix.K, mix.D, plan.reduced, wanted.dlogvar, stream);
}

}  // namespace

template <class T>
int64_t backward_scratch(const Mixture<T>& mix, const Gradients<T>& wanted) {
  if (is_small(mix.M, mix.K, mix.D)) return SmallPlan<T>(mix, wanted, nullptr).carve.size();
  return BackwardPlan<T>(mix, wanted, nullptr).carve.size();
}

template <class T>
void mixture_backward(const Mixture<T>& mix, const Gradients<T>& wanted, T* scratch, Stream stream) {
  if (is_small(mix.M, mix.K, mix.D)) return small_backward(mix, wanted, scratch, stream);
  if (!wanted.dz && !wanted.dmu && !wanted.dlogvar && !wanted.dweights) return;
  const BackwardPlan<T> plan(mix, wanted, scratch);
  const Packed<T>& packed = plan.packed;
  const auto sum = [&](const T* parts, int64_t splits, int64_t n, T* out) {
    if (parts) launch(stream, blocks_for(n, kThreads), 1, kThreads, 0, sum_parts<T>, parts, splits, n, out);
  };
  if (plan.steepness)
    reduce_all<false>(mix.logvar, mix.log_weights, mix.K, mix.D, plan.reduced, plan.widest, stream);
  pack<T>(mix, wanted.log_prob, plan.steepness ? plan.widest : nullptr, packed, stream);

  Task<T> task{mix, packed, wanted.log_prob, wanted.grad, wanted.negated, wanted.dense, log_negligible<T>(mix.K),
               0,   nullptr, nullptr,        nullptr,     nullptr};
  if (wanted.dz) {
    task.splits = plan.splits_z;
    task.dz = plan.dz ? plan.dz : wanted.dz;
    launch(stream, packed.row_tiles, plan.splits_z * plan.chunks_z, kThreads, sizeof(Shared<T>),
           backward<Side::rows, T>, task);
    sum(plan.dz, plan.splits_z, mix.M * mix.D, wanted.dz);
  }
  if (!plan.parameters) return;
  task.splits = plan.splits_parameters;
  task.dmu = plan.dmu ? plan.dmu : wanted.dmu;
  task.dlogvar = plan.dlogvar ? plan.dlogvar : wanted.dlogvar;
  task.dweights = plan.dweights ? plan.dweights : wanted.dweights;
  launch(stream, packed.panels, plan.splits_parameters * plan.chunks_parameters, kThreads, sizeof(Shared<T>),
         backward<Side::components, T>, task);
  sum(plan.dmu, plan.splits_parameters, mix.K * mix.D, wanted.dmu);
  sum(plan.dweights, plan.splits_parameters, mix.K, wanted.dweights);
  if (mix.shared && wanted.dlogvar)
    reduce_all<true, T>(plan.dlogvar, nullptr, plan.columns, mix.D, plan.reduced, wanted.dlogvar, stream);
  else
    sum(plan.dlogvar, plan.splits_parameters, mix.K * mix.D, wanted.dlogvar);
}

template int64_t backward_scratch<float>(const Mixture<float>&, const Gradients<float>&);
template int64_t backward_scratch<double>(const Mixture<double>&, const Gradients<double>&);
template void mixture_backward<float>(const Mixture<float>&, const Gradients<float>&, float*, Stream);
template void mixture_backward<double>(const Mixture<double>&, const Gradients<double>&, double*, Stream);

}  // namespace fastvae::cuda
