// Sampling of diagonal Gaussians and their KL to N(0, I).  The formulas:
//
//   z = mu + sigma eps      log q = -1/2 sum_d (eps^2 + logvar + log 2 pi)
//   dmu = sum_s g_z         dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q)
//
// or, where log q is differentiated along the path of z alone:
//
//   dmu = sum_s (g_z - g_log_q eps / sigma)      dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q eps^2)
//
// Here g_z is the upstream gradient of z.  Where kl = log q - log p, log p has a part in it: -g_log_q score.
//
// A row belongs to a group of 8, 16 or 32 lanes.  A lane works on four neighbouring numbers at a time, which is one
// block of Philox where D is a multiple of four.  Moving bytes bounds these kernels, so whole and aligned fours move as
// vectors.
#include "launch.cuh"
#include "row.cuh"

namespace fastvae::cuda {
namespace {

constexpr int kThreads = 256;

struct ThreadPosition {
  int64_t row;
  int lane, width;

  __device__ explicit ThreadPosition(int group) : width(group) {
    row = int64_t(blockIdx.x) * (kThreads / group) + int(threadIdx.x) / group;
    lane = int(threadIdx.x) % group;
  }
};

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2) rsample(Sample<T> task, int group) {
  const ThreadPosition position(group);
  const bool inside = position.row < task.S * task.M;
  const T log_q =
      draw_row<kVectors>(task, inside, position.row, position.lane, position.width, [](int, const T(&)[4]) {});
  if (inside && position.lane == 0) task.log_q[position.row] = log_q;
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2) rsample_backward(SampleBackward<T> task, int group) {
  const ThreadPosition position(group);
  if (position.row >= task.M) return;
  const uint64_t seed = uint64_t(*task.seed);
  for (int64_t d = 4 * position.lane; d < task.D; d += 4 * position.width) {
    const int64_t i = position.row * task.D + d, n = task.D - d;
    T sigma[4], dmu[4] = {}, dlogvar[4] = {};
    load<kVectors>(task.logvar + i, n, sigma);
    for (int j = 0; j < 4; ++j) sigma[j] = T(exp(T(0.5) * sigma[j]));
    for (int64_t s = 0; s < task.S; ++s) {
      const int64_t of_sample = s * task.M * task.D + i;
      T eps[4], g_z[4] = {};
      normals_from(seed, of_sample, eps);
      if (task.grad_z) load<kVectors>(task.grad_z + of_sample, n, g_z);
      const T g_log_q = task.grad_log_q[s * task.M + position.row];
      if (task.score) {
        T score[4];
        load<kVectors>(task.score + of_sample, n, score);
        for (int j = 0; j < 4; ++j) g_z[j] += rounded_product(-g_log_q, score[j]);
      }
      for (int j = 0; j < 4; ++j) {
        T d = g_z[j], subtracted = g_log_q;
        if (task.path_derivative) {
          d -= g_log_q * eps[j] / sigma[j];
          subtracted *= eps[j] * eps[j];
        }
        dmu[j] += d;
        dlogvar[j] += T(0.5) * T(fma(g_z[j] * sigma[j], eps[j], -subtracted));
      }
    }
    store<kVectors>(task.dmu + i, n, dmu);
    store<kVectors>(task.dlogvar + i, n, dlogvar);
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2) kl(GaussianKl<T> task, int group) {
  const ThreadPosition position(group);
  const bool inside = position.row < task.M;
  T total = 0;
  if (inside) {
    const T grad = task.kl ? T(0) : task.grad[position.row];
    for (int64_t d = 4 * position.lane; d < task.D; d += 4 * position.width) {
      const int64_t i = position.row * task.D + d, n = task.D - d;
      T mu[4], logvar[4], e[4];
      load<kVectors>(task.mu + i, n, mu);
      load<kVectors>(task.logvar + i, n, logvar);
      for (int j = 0; j < 4; ++j) {
        e[j] = T(expm1(logvar[j]));
        total += T(fma(mu[j], mu[j], e[j] - logvar[j]));  // 0 past the end
        mu[j] *= grad;
        e[j] *= T(0.5) * grad;
      }
      if (!task.kl) {
        store<kVectors>(task.dmu + i, n, mu);
        store<kVectors>(task.dlogvar + i, n, e);
      }
    }
  }
  if (!task.kl) return;
  total = group_sum(total, position.width);
  if (inside && position.lane == 0) task.kl[position.row] = T(0.5) * total;
}

// Launches `vector` where rows are whole fours and every pointer is aligned, else `scalar`.
template <class Task, class Kernel>
void launch_rows(const Task& task, int64_t rows, bool vectors, Kernel vector, Kernel scalar, Stream stream) {
  const int group = group_width(task.D);
  launch(stream, blocks_for(rows, kThreads / group), 1, kThreads, 0, vectors ? vector : scalar, task, group);
}

}  // namespace

template <class T>
void gaussian_rsample(const Sample<T>& task, Stream stream) {
  const bool vectors = task.D % 4 == 0 && aligned(task.mu) && aligned(task.logvar) && aligned(task.z);
  launch_rows(task, task.S * task.M, vectors, rsample<T, true>, rsample<T, false>, stream);
}

template <class T>
void gaussian_rsample_backward(const SampleBackward<T>& task, Stream stream) {
  const bool vectors = task.D % 4 == 0 && aligned(task.grad_z) && aligned(task.score) && aligned(task.logvar) &&
                       aligned(task.dmu) && aligned(task.dlogvar);
  launch_rows(task, task.M, vectors, rsample_backward<T, true>, rsample_backward<T, false>, stream);
}

template <class T>
void gaussian_kl(const GaussianKl<T>& task, Stream stream) {
  const bool vectors =
      task.D % 4 == 0 && aligned(task.mu) && aligned(task.logvar) && aligned(task.dmu) && aligned(task.dlogvar);
  launch_rows(task, task.M, vectors, kl<T, true>, kl<T, false>, stream);
}

template void gaussian_rsample<float>(const Sample<float>&, Stream);
template void gaussian_rsample<double>(const Sample<double>&, Stream);
template void gaussian_rsample_backward<float>(const SampleBackward<float>&, Stream);
template void gaussian_rsample_backward<double>(const SampleBackward<double>&, Stream);
template void gaussian_kl<float>(const GaussianKl<float>&, Stream);
template void gaussian_kl<double>(const GaussianKl<double>&, Stream);

}  // namespace fastvae::cuda
