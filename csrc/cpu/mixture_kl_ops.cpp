// mixture_kl and its gradients on the CPU: kl = log q(z) - log p(z), from the operators of sampling and density.
#include "operators.h"

namespace fastvae {
namespace {

Tensor flat(const Tensor& z) { return torch::stable::view(z, {z.size(0) * z.size(1), z.size(2)}); }

// log q becomes kl.
void subtract_log_p(const Tensor& log_q, const Tensor& log_p) {
  by_dtype(log_q, [&](auto zero, const auto&) {
    using T = decltype(zero);
    T* of_row = output<T>(log_q);
    const T* p = input<T>(log_p);
    for (int64_t i = 0; i < log_p.numel(); ++i) of_row[i] -= p[i];
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_kl(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                      int64_t num_samples, const Tensor& prior_mu,
                                                      const Tensor& prior_logvar, const OptionalTensor& log_weights,
                                                      const OptionalTensor& exclude, bool with_score) {
  auto [z, kl] = gaussian_rsample(mu, logvar, seed, num_samples);  // log q, until log p is known
  const Tensor rows = flat(z);
  Tensor log_prob, score;
  if (with_score) {
    std::tie(log_prob, score) = mixture_log_prob_and_score(rows, prior_mu, prior_logvar, log_weights, exclude);
  } else {
    log_prob = mixture_log_prob(rows, prior_mu, prior_logvar, log_weights, exclude);
    score = empty(z, {0});
  }
  subtract_log_p(kl, log_prob);
  return {z, kl, log_prob, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_kl_and_exponents(const Tensor& mu, const Tensor& logvar,
                                                                    const Tensor& seed, int64_t num_samples,
                                                                    const Tensor& prior_mu, const Tensor& prior_logvar,
                                                                    const OptionalTensor& log_weights,
                                                                    const OptionalTensor& exclude, bool need_q,
                                                                    int64_t exponents_per_row) {
  auto [z, kl] = gaussian_rsample(mu, logvar, seed, num_samples);
  auto [log_prob, kept] =
      mixture_log_prob_and_exponents(flat(z), prior_mu, prior_logvar, log_weights, exclude, need_q, exponents_per_row);
  subtract_log_p(kl, log_prob);
  return {z, kl, log_prob, kept};
}

// dz becomes the whole gradient in z: the part through log p, and grad_z, which is upstream of z itself and may be
// null.  The part through log p is `grad` [N] times the score where there is a score, else it is in dz already.
void finish_dz(const Tensor& dz, const Tensor& grad, const Tensor& score, const OptionalTensor& grad_z) {
  const int64_t N = grad.numel(), D = dz.size(1);
  by_dtype(dz, [&](auto zero, const auto&) {
    using T = decltype(zero);
    const T *g = input<T>(grad), *s = score.numel() ? input<T>(score) : nullptr, *direct = input<T>(grad_z);
    T* out = output<T>(dz);
    run_pieces(N, std::max<int64_t>(1, 4096 / D), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t i = row * D; i < (row + 1) * D; ++i) {
          const T through = s ? g[row] * s[i] : out[i];
          out[i] = direct ? through + direct[i] : through;
        }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_from(
    const OptionalTensor& exponents, const OptionalTensor& grad_z, const Tensor& grad_kl, const Tensor& logvar,
    const Tensor& seed, bool path_derivative, const Tensor& z, const Tensor& log_prob, const Tensor& score,
    const Tensor& prior_mu, const Tensor& prior_logvar, const OptionalTensor& log_weights,
    const OptionalTensor& exclude, bool dense, bool need_q, bool need_mu, bool need_logvar, bool need_log_weights) {
  check_floats({&z, &grad_kl, &score, grad_z ? &*grad_z : &z});
  STD_TORCH_CHECK(z.dim() == 3 && grad_kl.numel() == z.size(0) * z.size(1) &&
                      (!grad_z || grad_z->numel() == z.numel()) && (score.numel() == 0 || score.numel() == z.numel()),
                  "fastvae: want z and grad_z [S, M, D], grad_kl [S, M] and score [S M, D]");
  Tensor grad = new_result(z, {grad_kl.numel()});
  by_dtype(z, [&](auto zero, const auto&) {
    using T = decltype(zero);
    const T* g = input<T>(grad_kl);
    std::transform(g, g + grad_kl.numel(), output<T>(grad), [](T x) { return -x; });
  });
  const bool from_score = need_q && score.numel() > 0, need_z = need_q && !from_score;
  const auto nothing = [&] { return empty(z, {0}); };
  Tensor dz = nothing(), dprior_mu = nothing(), dprior_logvar = nothing(), dlog_weights = nothing();
  if (need_z || need_mu || need_logvar || need_log_weights)
    std::tie(dz, dprior_mu, dprior_logvar, dlog_weights) =
        mixture_log_prob_backward_from(exponents, grad, log_prob, flat(z), prior_mu, prior_logvar, log_weights, exclude,
                                       dense, need_z, need_mu, need_logvar, need_log_weights);
  if (!need_q) return {nothing(), nothing(), dprior_mu, dprior_logvar, dlog_weights};
  if (from_score) dz = new_result(z, {grad_kl.numel(), z.size(2)});
  if (from_score || grad_z) finish_dz(dz, grad, score, grad_z);
  const Tensor arriving = torch::stable::view(dz, {z.size(0), z.size(1), z.size(2)});
  auto [dmu, dlogvar] = gaussian_rsample_backward(arriving, grad_kl, logvar, seed, path_derivative);
  return {dmu, dlogvar, dprior_mu, dprior_logvar, dlog_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_kl_backward(
    const OptionalTensor& grad_z, const Tensor& grad_kl, const Tensor& logvar, const Tensor& seed, bool path_derivative,
    const Tensor& z, const Tensor& log_prob, const Tensor& score, const Tensor& prior_mu, const Tensor& prior_logvar,
    const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_q, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  return backward_from({}, grad_z, grad_kl, logvar, seed, path_derivative, z, log_prob, score, prior_mu, prior_logvar,
                       log_weights, exclude, dense, need_q, need_mu, need_logvar, need_log_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_kl_backward_from_exponents(
    const OptionalTensor& grad_z, const Tensor& grad_kl, const Tensor& logvar, const Tensor& seed, bool path_derivative,
    const Tensor& z, const Tensor& log_prob, const Tensor& exponents, const Tensor& prior_mu,
    const Tensor& prior_logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool need_q,
    bool need_mu, bool need_logvar, bool need_log_weights) {
  return backward_from(exponents, grad_z, grad_kl, logvar, seed, path_derivative, z, log_prob, empty(z, {0}), prior_mu,
                       prior_logvar, log_weights, exclude, false, need_q, need_mu, need_logvar, need_log_weights);
}

}  // namespace

FASTVAE_REGISTER(FASTVAE_CPU_LIBRARY, CPU, m) {
  m.impl("mixture_kl", TORCH_BOX(&mixture_kl));
  m.impl("mixture_kl_backward", TORCH_BOX(&mixture_kl_backward));
  m.impl("mixture_kl_and_exponents", TORCH_BOX(&mixture_kl_and_exponents));
  m.impl("mixture_kl_backward_from_exponents", TORCH_BOX(&mixture_kl_backward_from_exponents));
}

}  // namespace fastvae
