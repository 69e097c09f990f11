// Sampling of diagonal Gaussians and their KL to N(0, I), over raw pointers.
//
//   z = mu + sigma eps      log q = -1/2 sum_d (eps^2 + logvar + log 2 pi)
//   dmu = sum_s g_z         dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q)
//
// or, with path_derivative, where log q depends on mu and logvar through z alone, d log q / dz = -eps / sigma:
//
//   dmu = sum_s (g_z - g_log_q eps / sigma)      dlogvar = 1/2 sum_s (g_z sigma eps - g_log_q eps^2)
#pragma once

#include "kernels.h"
#include "random_normal.h"

namespace FASTVAE_ISA {

using fastvae::KlBackward;
using fastvae::Sample;
using fastvae::SampleBackward;

// The normal numbers of one stream from `begin` on, made a piece at a time.
template <class T>
class Noise {
 public:
  Noise(uint64_t seed, int64_t begin) : seed_(seed), base_(begin / 4 * 4 - kSize) { seek(begin); }

  // n numbers from i on; two whole vectors may be read.  i must not decrease from call to call.
  const T* at(int64_t i, int64_t n) {
    if (i + n > base_ + kSize) seek(i);
    return numbers_ + (i - base_);
  }

 private:
  static constexpr int kGroups = 8, kSize = kGroups * kNormals;

  void seek(int64_t i) {
    base_ = i / 4 * 4;
    philox_normals<T, kGroups>(seed_, uint64_t(base_) / 4, numbers_);
  }

  uint64_t seed_;
  int64_t base_;
  T numbers_[kSize + 2 * kWidth<T>] = {};
};

// Nothing is loaded while the noise is made, so that the hardware's own prefetching does not look far enough ahead.
template <class T>
inline void prefetch(const T* p) {
  constexpr int64_t kAhead = 1024;  // bytes
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}

// Two vectors from p on; if not kWhole, only the n numbers that there are.
template <bool kWhole, class T>
inline void load_two(const T* p, int64_t n, Vec<T> (&v)[2]) {
  v[0] = kWhole ? load<T>(p) : load_up_to(p, n);
  v[1] = kWhole ? load<T>(p + kWidth<T>) : load_up_to(p + kWidth<T>, n > kWidth<T> ? n - kWidth<T> : 0);
}

// The way back.  `nontemporal`: past the caches, which wants p aligned.
template <bool kWhole, class T>
inline void store_two(T* p, const Vec<T> (&v)[2], int64_t n, bool nontemporal) {
  if (kWhole && nontemporal) {
    stream<T>(p, v[0]);
    stream<T>(p + kWidth<T>, v[1]);
    return;
  }
  kWhole ? store<T>(p, v[0]) : store_up_to(p, v[0], n);
  kWhole ? store<T>(p + kWidth<T>, v[1]) : store_up_to(p + kWidth<T>, v[1], n > kWidth<T> ? n - kWidth<T> : 0);
}

template <class T>
inline bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

// f(whole, d, n) for every two vectors of a row, n numbers from d on.  `whole` is false_type where these are fewer than
// two vectors.
template <class T, class F>
inline void for_pairs(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + 2 * kWidth<T> <= D; d += 2 * kWidth<T>) f(std::true_type(), d, 2 * kWidth<T>);
  if (d < D) f(std::false_type(), d, D - d);
}

template <class T>
inline void sigma_of(Vec<T> (&logvar)[2]) {
  for (Vec<T>& x : logvar) x *= T(0.5);
  exponentials<T>(logvar);
}

template <class T>
void gaussian_rsample(const Sample<T>& task) {
  const int64_t D = task.D;
  const T log_2pi = T(1.83787706640934548356);
  Noise<T> noise(task.seed, task.row_begin * D);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const T *row_mu = task.mu + row % task.M * D, *row_logvar = task.logvar + row % task.M * D;
    T* row_z = task.z + row * D;
    const bool nontemporal = task.large && aligned(row_z);
    Vec<T> total{};
    for_pairs<T>(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool kWhole = decltype(whole)::value;
      prefetch(row_mu + d);
      prefetch(row_logvar + d);
      Vec<T> mu[2], logvar[2], eps[2], z[2];
      load_two<kWhole>(row_mu + d, n, mu);
      load_two<kWhole>(row_logvar + d, n, logvar);
      load_two<true>(noise.at(row * D + d, n), n, eps);
      Vec<T> sigma[2] = {logvar[0], logvar[1]};
      sigma_of<T>(sigma);
      for (int i = 0; i < 2; ++i) {
        z[i] = fma<T>(sigma[i], eps[i], mu[i]);
        const Vec<T> term = fma<T>(eps[i], eps[i], logvar[i]);
        total += kWhole ? term : keep<T>(term, n - i * kWidth<T>);
      }
      store_two<kWhole>(row_z + d, z, n, nontemporal);
    });
    task.log_q[row] = T(-0.5) * (sum<T>(total) + T(D) * log_2pi);
  }
  if (task.large) drain();
}

template <class T>
void gaussian_rsample_backward(const SampleBackward<T>& task) {
  const int64_t D = task.D;
  for (int64_t s = 0; s < task.S; ++s) {
    Noise<T> noise(task.seed, (s * task.M + task.row_begin) * D);
    for (int64_t m = task.row_begin; m < task.row_end; ++m) {
      const int64_t row = s * task.M + m;
      const T g_log_q = task.grad_log_q[row];
      const T *row_logvar = task.logvar + m * D, *row_g_z = task.grad_z + row * D;
      T *row_dmu = task.dmu + m * D, *row_dlogvar = task.dlogvar + m * D;
      const bool nontemporal = task.large && s == task.S - 1 && aligned(row_dmu) && aligned(row_dlogvar);
      for_pairs<T>(D, [&](auto whole, int64_t d, int64_t n) {
        constexpr bool kWhole = decltype(whole)::value;
        prefetch(row_logvar + d);
        prefetch(row_g_z + d);
        Vec<T> sigma[2], eps[2], g_z[2], dmu[2] = {}, dlogvar[2] = {};
        load_two<kWhole>(row_logvar + d, n, sigma);
        load_two<kWhole>(row_g_z + d, n, g_z);
        load_two<true>(noise.at(row * D + d, n), n, eps);
        sigma_of<T>(sigma);
        if (s) {
          load_two<kWhole>(row_dmu + d, n, dmu);
          load_two<kWhole>(row_dlogvar + d, n, dlogvar);
        }
        for (int i = 0; i < 2; ++i) {
          Vec<T> through_mu = g_z[i], through_logvar = fma<T>(g_z[i] * sigma[i], eps[i], broadcast<T>(-g_log_q));
          if (task.path_derivative) {
            through_mu = g_z[i] - g_log_q * eps[i] / sigma[i];
            through_logvar = eps[i] * fma<T>(g_z[i], sigma[i], -g_log_q * eps[i]);
          }
          dmu[i] += through_mu;
          dlogvar[i] = fma<T>(through_logvar, broadcast<T>(T(0.5)), dlogvar[i]);
        }
        store_two<kWhole>(row_dmu + d, dmu, n, nontemporal);
        store_two<kWhole>(row_dlogvar + d, dlogvar, n, nontemporal);
      });
    }
  }
  if (task.large) drain();
}

template <class T>
void gaussian_kl(const T* mu, const T* logvar, int64_t rows, int64_t D, T* kl) {
  constexpr int64_t kBlock = 64 * 2 * kWidth<T>;  // a lane adds 64 terms, which may be equal, then the blocks' sums
  for (int64_t m = 0; m < rows; ++m, mu += D, logvar += D) {
    Vec<T> total{};
    for (int64_t begin = 0; begin < D; begin += kBlock) {
      Vec<T> block[2] = {};
      for_pairs<T>(D - begin < kBlock ? D - begin : kBlock, [&](auto whole, int64_t d, int64_t n) {
        constexpr bool kWhole = decltype(whole)::value;
        const T *row_mu = mu + begin + d, *row_logvar = logvar + begin + d;
        prefetch(row_mu);
        prefetch(row_logvar);
        Vec<T> x[2], lv[2];  // a lane past the end holds mu = logvar = 0, which adds 0
        load_two<kWhole>(row_mu, n, x);
        load_two<kWhole>(row_logvar, n, lv);
        for (int i = 0; i < 2; ++i) block[i] += fma<T>(x[i], x[i], exponential<T>(lv[i]).exp_minus_1_minus_x);
      });
      total += block[0] + block[1];
    }
    kl[m] = T(0.5) * sum<T>(total);
  }
}

template <class T>
void gaussian_kl_backward(const KlBackward<T>& task) {
  const int64_t D = task.D;
  for (int64_t m = task.row_begin; m < task.row_end; ++m) {
    const T g = task.grad[m];
    const T *row_mu = task.mu + m * D, *row_logvar = task.logvar + m * D;
    T *row_dmu = task.dmu + m * D, *row_dlogvar = task.dlogvar + m * D;
    const bool nontemporal = task.large && aligned(row_dmu) && aligned(row_dlogvar);
    for_pairs<T>(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool kWhole = decltype(whole)::value;
      Vec<T> dmu[2], dlogvar[2];
      load_two<kWhole>(row_mu + d, n, dmu);
      load_two<kWhole>(row_logvar + d, n, dlogvar);
      for (int i = 0; i < 2; ++i) {
        dmu[i] *= g;
        dlogvar[i] = (exponential<T>(dlogvar[i]).exp_minus_1_minus_x + dlogvar[i]) * (T(0.5) * g);
      }
      store_two<kWhole>(row_dmu + d, dmu, n, nontemporal);
      store_two<kWhole>(row_dlogvar + d, dlogvar, n, nontemporal);
    });
  }
  if (task.large) drain();
}

}  // namespace FASTVAE_ISA
