// Sampling of diagonal Gaussians and their KL to N(0, I), over raw pointers.
//
//   z = mu + sigma eps      log q = -1/2 sum_d (eps^2 + logvar + log 2 pi)
//   dmu = sum_s g_z         dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q)
//
// or, where log q is differentiated along the path of z alone, d log q / dz = -eps / sigma:
//
//   dmu = sum_s (g_z - g_log_q eps / sigma)      dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q eps^2)
#pragma once

#include "kernels.h"
#include "vector_math.h"

namespace FASTVAE_ISA {

using fastvae::Sample;
using fastvae::SampleBackward;

// The normal numbers of one stream from `begin` on, made a piece at a time in order of use.
template <class T>
class Noise {
 public:
  Noise(uint64_t seed, int64_t begin) : seed_(seed), base_(begin / 4 * 4 - kSize) { seek(begin); }

  // Numbers i ... i + kWidth - 1; i must not decrease from call to call.
  Vec<T> at(int64_t i) {
    if (i + kWidth<T> > base_ + kSize) seek(i);
    return load<T>(numbers_ + (i - base_));
  }

 private:
  static constexpr int kGroups = 8, kSize = kGroups * kNormals;

  void seek(int64_t i) {
    base_ = i / 4 * 4;
    philox_normals<T, kGroups>(seed_, uint64_t(base_) / 4, numbers_);
  }

  uint64_t seed_;
  int64_t base_;
  T numbers_[kSize];
};

// While the noise is made nothing is loaded, so that the hardware does not look far enough ahead by itself.
constexpr int64_t kAhead = 2048;  // bytes

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}

template <class T>
inline void prefetch_to_write(T* p) {
  __builtin_prefetch(reinterpret_cast<char*>(p) + kAhead, 1);
}

template <class T>
void gaussian_rsample(const Sample<T>& task) {
  const int64_t D = task.D;
  constexpr int W = kWidth<T>;
  const T log_2pi = T(1.83787706640934548356);
  Noise<T> noise(task.seed, task.row_begin * D);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t m = row % task.M;
    Vec<T> total{};
    for (int64_t d = 0; d < D; d += W) {
      prefetch(task.mu + m * D + d);
      prefetch(task.logvar + m * D + d);
      prefetch_to_write(task.z + row * D + d);
      const Vec<T> mu = load_up_to(task.mu + m * D + d, D - d);
      const Vec<T> logvar = load_up_to(task.logvar + m * D + d, D - d);
      const Vec<T> eps = noise.at(row * D + d);
      store_up_to(task.z + row * D + d, fma<T>(exponential<T>(logvar * T(0.5)).exp, eps, mu), D - d);
      total += keep<T>(fma<T>(eps, eps, logvar), D - d);
    }
    task.log_q[row] = T(-0.5) * (sum<T>(total) + T(D) * log_2pi);
  }
}

template <class T>
void gaussian_rsample_backward(const SampleBackward<T>& task) {
  const int64_t D = task.D;
  constexpr int W = kWidth<T>;
  for (int64_t s = 0; s < task.S; ++s) {
    Noise<T> noise(task.seed, (s * task.M + task.row_begin) * D);
    for (int64_t m = task.row_begin; m < task.row_end; ++m) {
      const int64_t row = s * task.M + m;
      const T g_log_q = task.grad_log_q[row];
      for (int64_t d = 0; d < D; d += W) {
        const int64_t i = m * D + d, n = D - d;
        prefetch(task.logvar + i);
        prefetch(task.grad_z + row * D + d);
        prefetch_to_write(task.dmu + i);
        prefetch_to_write(task.dlogvar + i);
        const Vec<T> sigma = exponential<T>(load_up_to(task.logvar + i, n) * T(0.5)).exp;
        const Vec<T> eps = noise.at(row * D + d);
        const Vec<T> g_z = load_up_to(task.grad_z + row * D + d, n);
        Vec<T> dmu = g_z, dlogvar = fma<T>(g_z * sigma, eps, broadcast<T>(-g_log_q));
        if (task.path_derivative) {
          dmu = g_z - g_log_q * eps / sigma;
          dlogvar = eps * fma<T>(g_z, sigma, -g_log_q * eps);
        }
        const Vec<T> dmu_before = s ? load_up_to(task.dmu + i, n) : Vec<T>{};
        const Vec<T> dlogvar_before = s ? load_up_to(task.dlogvar + i, n) : Vec<T>{};
        store_up_to(task.dmu + i, dmu_before + dmu, n);
        store_up_to(task.dlogvar + i, fma<T>(dlogvar, broadcast<T>(T(0.5)), dlogvar_before), n);
      }
    }
  }
}

template <class T>
void gaussian_kl(const T* mu, const T* logvar, int64_t rows, int64_t D, T* kl) {
  for (int64_t m = 0; m < rows; ++m) {
    Vec<T> total{};
    for (int64_t d = 0; d < D; d += kWidth<T>) {  // a lane past the end holds mu = logvar = 0, which adds 0
      const Vec<T> x = load_up_to(mu + m * D + d, D - d);
      total += fma<T>(x, x, exponential<T>(load_up_to(logvar + m * D + d, D - d)).exp_minus_1_minus_x);
    }
    kl[m] = T(0.5) * sum<T>(total);
  }
}

template <class T>
void gaussian_kl_backward(const T* grad, const T* mu, const T* logvar, int64_t rows, int64_t D, T* dmu, T* dlogvar) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t d = 0; d < D; d += kWidth<T>) {
      const int64_t i = m * D + d, n = D - d;
      const Vec<T> lv = load_up_to(logvar + i, n);
      store_up_to(dmu + i, load_up_to(mu + i, n) * grad[m], n);
      store_up_to(dlogvar + i, (exponential<T>(lv).exp_minus_1_minus_x + lv) * (T(0.5) * grad[m]), n);
    }
  }
}

}  // namespace FASTVAE_ISA
