// What is found out about a mixture before the kernels run: the order in which its dimensions, its components and the
// rows are best taken.  In a good order few tiles are active, and early checks find the others.  Any order gives right
// results.
#pragma once

#include <array>
#include <cmath>
#include <numeric>

#include "host.h"

namespace fastvae {

// The beginning of part i of n, cut into equal parts.
inline int64_t cut(int64_t n, int64_t parts, int64_t i) { return n / parts * i + std::min(i, n % parts); }

template <class T>
class Prepared {
 public:
  Mixture<T> mixture;

  // For M rows; `dense` if nothing is to be left out.
  Prepared(const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights, int64_t M,
           bool gradient_in_z, bool dense) {
    const int64_t K = mu.size(0), D = mu.size(1);
    mixture = {input<T>(mu), input<T>(logvar), input<T>(log_weights), K, D, logvar.size(0) != K, {}, {}, {}, {}};
    const T* first = mixture.logvar;
    mixture.isotropic = mixture.shared && std::all_of(first, first + D, [&](T lv) { return lv == *first; });
    position_.resize(D);
    std::iota(position_.begin(), position_.end(), 0);
    const bool separated = M * K >= kMinPairs && order_dimensions();
    mixture.position = position_.data();
    if (separated && !dense && M >= kMinRows && K >= kMinComponents) {
      grow_tree();
      order_ = in_order(mixture.mu, K, begins_);
      mixture.order = order_.data();
    }
    if (gradient_in_z) {
      find_max_logvar();
      mixture.max_logvar = max_logvar_.data();
    }
  }

  // The order of n rows [n, D], leaf by leaf of the tree, by counting sort.  begins[l] is where leaf l begins in it.
  std::vector<int64_t> in_order(const T* rows, int64_t n, std::vector<int64_t>& begins) const {
    std::vector<uint16_t> leaf(static_cast<size_t>(n));
    const int64_t parts = std::clamp<int64_t>(n / 1024, 1, 64);
    run_tasks(parts, [&](int64_t part) {
      for (int64_t i = cut(n, parts, part); i < cut(n, parts, part + 1); ++i) leaf[i] = leaf_of(rows + i * mixture.D);
    });
    begins.assign(kLeaves + 1, 0);
    for (const uint16_t l : leaf) ++begins[l + 1];
    for (int64_t l = 0; l < kLeaves; ++l) begins[l + 1] += begins[l];
    std::vector<int64_t> next = begins, order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[next[leaf[i]]++] = i;
    return order;
  }

  // An index in the order near which the components lie that are near to a row [D].
  int64_t index_near(const T* row) const { return begins_[leaf_of(row)]; }

 private:
  static constexpr int64_t kMinPairs = 1 << 16;  // rows times components, below which finding an order takes too long
  // Below these, sorting and computing a lower bound of l take longer than the tiles that they save.
  static constexpr int64_t kMinRows = 32, kMinComponents = 1024;
  static constexpr int64_t kDepth = 10, kLeaves = 1 << kDepth, kSample = 1024;  // of the tree
  // Ordering is worth its time where two components differ by so many nats, on average, in the kLeading dimensions that
  // separate them best.  That is somewhat more than a term has to lie below the largest to be left out.
  static constexpr int64_t kLeading = 8;
  static constexpr double kMinSeparation = 40;

  // Where a node of the tree sends a row: to the right if it is greater than the threshold in that dimension.
  struct Fork {
    int32_t dimension;
    T threshold;
  };
  using LeadingMean = std::array<T, kLeading>;  // a component's mean in the leading dimensions

  std::vector<int32_t> position_;
  std::vector<int64_t> order_, begins_;
  std::vector<T> max_logvar_;
  std::vector<int32_t> leading_;           // dimensions
  std::vector<double> leading_precision_;  // of these: 1 / sigma^2, on average over the components
  std::vector<Fork> forks_;                // the children of node i are 2 i and 2 i + 1, the root is 1

  uint16_t leaf_of(const T* row) const {
    size_t node = 1;
    for (int64_t level = 0; level < kDepth; ++level)
      node = 2 * node + (row[forks_[node].dimension] > forks_[node].threshold);
    return uint16_t(node - kLeaves);
  }

  // A k-d tree over a sample of the components.  Each node halves its components at their mean, in that one of the
  // leading dimensions in which their means spread furthest, in standard deviations of the components.
  void grow_tree() {
    std::vector<LeadingMean> sample;
    const int64_t step = std::max<int64_t>(1, mixture.K / kSample);
    for (int64_t k = 0; k < mixture.K; k += step) {
      if (absent(k)) continue;
      LeadingMean& x = sample.emplace_back();
      for (size_t i = 0; i < leading_.size(); ++i) x[i] = mixture.mu[k * mixture.D + leading_[i]];
    }
    forks_.assign(kLeaves, {leading_[0], T(INFINITY)});  // where there is nothing to halve, all go left
    grow(1, sample.data(), sample.data() + sample.size());
  }

  void grow(int64_t node, LeadingMean* begin, LeadingMean* end) {
    if (node >= kLeaves || end - begin < 2) return;
    std::array<double, kLeading> sum{}, square{};
    for (const LeadingMean* x = begin; x < end; ++x) {
      for (size_t i = 0; i < leading_.size(); ++i) {
        sum[i] += (*x)[i];
        square[i] += double((*x)[i]) * (*x)[i];
      }
    }
    const double count = double(end - begin);
    size_t best = 0;
    double max_spread = 0;
    for (size_t i = 0; i < leading_.size(); ++i) {
      const double spread = (square[i] - sum[i] * sum[i] / count) * leading_precision_[i];
      if (spread > max_spread) best = i, max_spread = spread;
    }
    const T threshold = T(sum[best] / count);
    forks_[node] = {leading_[best], threshold};
    LeadingMean* middle = std::partition(begin, end, [&](const LeadingMean& x) { return !(x[best] > threshold); });
    grow(2 * node, begin, middle);
    grow(2 * node + 1, middle, end);
  }

  bool absent(int64_t k) const { return mixture.log_weights && mixture.log_weights[k] == T(-INFINITY); }
  const T* logvar_of(int64_t k) const { return mixture.logvar + (mixture.shared ? 0 : k * mixture.D); }

  // Dimensions come first in which the components are separated best: by the variance of their means over their
  // variances, in a sample of the components.  True if the leading ones separate them well.
  bool order_dimensions() {
    const int64_t K = mixture.K, D = mixture.D, step = std::max<int64_t>(1, K / 128);
    std::vector<double> sum(D), square(D), logvar(D), separation(D);
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
      separation[d] = std::log((square[d] - sum[d] * sum[d] / count) / count) - logvar[d] / count;
      if (std::isnan(separation[d])) separation[d] = -INFINITY;
    }
    std::vector<int32_t> order(D);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return separation[a] > separation[b]; });
    for (int64_t i = 0; i < D; ++i) position_[order[i]] = int32_t(i);
    double nats = 0;
    for (int64_t i = 0; i < std::min(D, kLeading); ++i) {
      nats += std::exp(separation[order[i]]);
      leading_.push_back(order[i]);
      leading_precision_.push_back(std::exp(-logvar[order[i]] / count));
    }
    return nats > kMinSeparation;
  }

  void find_max_logvar() {
    const int64_t D = mixture.D, rows = mixture.shared ? 1 : mixture.K, parts = std::clamp<int64_t>(rows / 1024, 1, 64);
    max_logvar_.assign(parts * D, T(-INFINITY));
    run_tasks(parts, [&](int64_t part) {
      T* max = max_logvar_.data() + part * D;
      for (int64_t k = cut(rows, parts, part); k < cut(rows, parts, part + 1); ++k) {
        if (!mixture.shared && absent(k)) continue;
        const T* logvar = mixture.logvar + k * D;
        for (int64_t d = 0; d < D; ++d) max[d] = logvar[d] > max[d] ? logvar[d] : max[d];
      }
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t d = 0; d < D; ++d) max_logvar_[d] = std::max(max_logvar_[d], max_logvar_[part * D + d]);
  }
};

// The rows as the kernels take them: as they are, or a copy in the mixture's order.
template <class T>
class Rows {
 public:
  const T* z;
  const int64_t* exclude;  // the components to leave out, by their indices in the order

  Rows(const Prepared<T>& prepared, const T* rows, const int64_t* excluded, int64_t M) : z(rows), exclude(excluded) {
    const Mixture<T>& mixture = prepared.mixture;
    if (!mixture.order) return;
    std::vector<int64_t> begins;
    order_ = prepared.in_order(rows, M, begins);
    z_.resize(size_t(M * mixture.D));
    for (int64_t i = 0; i < M; ++i) std::copy_n(rows + order_[i] * mixture.D, mixture.D, z_.data() + i * mixture.D);
    z = z_.data();
    if (!excluded) return;
    std::vector<int64_t> index(static_cast<size_t>(mixture.K));
    for (int64_t i = 0; i < mixture.K; ++i) index[mixture.order[i]] = i;
    for (int64_t i = 0; i < M; ++i) {
      const int64_t k = excluded[order_[i]];
      exclude_.push_back(k < 0 || k >= mixture.K ? -1 : index[k]);
    }
    exclude = exclude_.data();
  }

  // The index of row i in the caller's order.
  int64_t operator[](int64_t i) const { return order_.empty() ? i : order_[i]; }

  // x[(*this)[i]] for every row i; x itself, if the order is the same.
  const T* reordered(const T* x, std::vector<T>& memory) const {
    if (order_.empty()) return x;
    for (const int64_t i : order_) memory.push_back(x[i]);
    return memory.data();
  }

 private:
  std::vector<int64_t> order_, exclude_;
  std::vector<T> z_;
};

}  // namespace fastvae
