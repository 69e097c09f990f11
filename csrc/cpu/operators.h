// The operators on the CPU of which mixture_kl is made.
#pragma once

#include "host.h"

namespace fastvae {

Tensor mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
                        const OptionalTensor& exclude);

std::tuple<Tensor, Tensor> mixture_log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const OptionalTensor& log_weights, const OptionalTensor& exclude);

// log p(z) [M], and the exponents that backward takes [M, exponents_per_row].  need_z: backward will be asked for the
// gradient in z.
std::tuple<Tensor, Tensor> mixture_log_prob_and_exponents(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                          const OptionalTensor& log_weights,
                                                          const OptionalTensor& exclude, bool need_z,
                                                          int64_t exponents_per_row);

// The gradients in z, mu, logvar and log_weights; a gradient that is not asked for has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from(
    const OptionalTensor& exponents, const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z,
    bool need_mu, bool need_logvar, bool need_log_weights);

std::tuple<Tensor, Tensor> gaussian_rsample(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                            int64_t num_samples);

std::tuple<Tensor, Tensor> gaussian_rsample_backward(const Tensor& grad_z, const Tensor& grad_log_q,
                                                     const Tensor& logvar, const Tensor& seed, bool path_derivative);

}  // namespace fastvae
