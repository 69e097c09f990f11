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
// vectors, and all loads of a lane's next fours are on their way before it computes.
#include "launch.cuh"
#include "row.cuh"

namespace fastvae::cuda {
namespace {

// With 256 threads, each of which has 64 bytes of loads on their way, two blocks of a multiprocessor ask for 32 KiB.  A
// memory of 4.3 TB/s that answers in 0.75 us has 24 KB on their way to each of 132 multiprocessors.
constexpr int kThreads = 256;

struct ThreadPosition {
  int64_t row;
  int lane, width;

  __device__ explicit ThreadPosition(int group) : width(group) {  // a power of two
    const int shift = __ffs(group) - 1;
    row = int64_t(blockIdx.x) * (kThreads >> shift) + (int(threadIdx.x) >> shift);
    lane = int(threadIdx.x) & (group - 1);
  }
};

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, kVectors && sizeof(T) == 4 ? 4 : 2) rsample(Sample<T> task, int group) {
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
  constexpr int n = kFours<kVectors, T>;
  const uint64_t seed = uint64_t(*task.seed);
  const int64_t D = task.D;
  for (int64_t begin = 4 * position.lane; begin < D; begin += 4 * n * position.width) {
    const auto each = [&](const auto& body) { each_four<n>(begin, D, position.width, body); };
    T sigma[n][4], dmu[n][4] = {}, dlogvar[n][4] = {};
    each([&](int i, int64_t d) { load<kVectors>(task.logvar + position.row * D + d, D - d, sigma[i]); });
    for (int64_t s = 0; s < task.S; ++s) {
      const int64_t row = s * task.M + position.row;
      T g_z[n][4] = {}, score[n][4];
      if (task.grad_z) each([&](int i, int64_t d) { load<kVectors, true>(task.grad_z + row * D + d, D - d, g_z[i]); });
      if (task.score) each([&](int i, int64_t d) { load<kVectors, true>(task.score + row * D + d, D - d, score[i]); });
      const T g_log_q = task.grad_log_q[row];
      if (s == 0)  // and not before: the loads above would wait for logvar
        each([&](int i, int64_t) {
          for (int j = 0; j < 4; ++j) sigma[i][j] = T(exp(T(0.5) * sigma[i][j]));
        });
      each([&](int i, int64_t d) {
        T eps[4];
        normals_from<kVectors>(seed, row * D + d, eps);
        T to_mu[4], subtracted[4];
        for (int j = 0; j < 4; ++j) {
          if (task.score) g_z[i][j] += rounded_product(-g_log_q, score[i][j]);
          to_mu[j] = g_z[i][j];
          subtracted[j] = g_log_q;
        }
        if (task.path_derivative)
          for (int j = 0; j < 4; ++j) {
            to_mu[j] -= g_log_q * eps[j] / sigma[i][j];
            subtracted[j] *= eps[j] * eps[j];
          }
        for (int j = 0; j < 4; ++j) {
          dmu[i][j] += to_mu[j];
          dlogvar[i][j] += T(0.5) * T(fma(g_z[i][j] * sigma[i][j], eps[j], -subtracted[j]));
        }
      });
    }
    each([&](int i, int64_t d) {
      store<kVectors>(task.dmu + position.row * D + d, D - d, dmu[i]);
      store<kVectors>(task.dlogvar + position.row * D + d, D - d, dlogvar[i]);
    });
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2) kl(GaussianKl<T> task, int group) {
  const ThreadPosition position(group);
  const bool inside = position.row < task.M;
  constexpr int n = kFours<kVectors, T>;
  T total = 0;
  if (inside) {
    const T grad = task.kl ? T(0) : task.grad[position.row];
    for (int64_t begin = 4 * position.lane; begin < task.D; begin += 4 * n * position.width) {
      T mu[n][4], logvar[n][4];
      each_four<n>(begin, task.D, position.width, [&](int i, int64_t d) {
        load<kVectors>(task.mu + position.row * task.D + d, task.D - d, mu[i]);
        load<kVectors>(task.logvar + position.row * task.D + d, task.D - d, logvar[i]);
      });
      each_four<n>(begin, task.D, position.width, [&](int i, int64_t d) {
        T e[4];
        for (int j = 0; j < 4; ++j) {
          e[j] = T(expm1(logvar[i][j]));
          total += T(fma(mu[i][j], mu[i][j], e[j] - logvar[i][j]));  // 0 past the end
          mu[i][j] *= grad;
          e[j] *= T(0.5) * grad;
        }
        if (task.kl) return;
        store<kVectors>(task.dmu + position.row * task.D + d, task.D - d, mu[i]);
        store<kVectors>(task.dlogvar + position.row * task.D + d, task.D - d, e);
      });
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
