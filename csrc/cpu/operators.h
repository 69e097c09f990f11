// The operators on the CPU that mixture_kl is made of.
#pragma once

#include "host.h"

namespace fastvae {

Tensor mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
                        const OptionalTensor& exclude);

std::tuple<Tensor, Tensor> mixture_log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const OptionalTensor& log_weights, const OptionalTensor& exclude);

// log p(z), and what it kept for backward; need_z tells whether that will be asked for a gradient in z.
std::tuple<Tensor, Tensor> mixture_log_prob_and_exponents(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                          const OptionalTensor& log_weights,
                                                          const OptionalTensor& exclude, bool need_z);

// The gradients in z, mu, logvar and log_weights; one that is not asked for has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from(
    const OptionalTensor& exponents, const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z,
    bool need_mu, bool need_logvar, bool need_log_weights);

std::tuple<Tensor, Tensor> gaussian_rsample(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                            int64_t num_samples);

std::tuple<Tensor, Tensor> gaussian_rsample_backward(const Tensor& grad_z, const Tensor& grad_log_q,
                                                     const Tensor& logvar, const Tensor& seed, bool path_derivative);

}  // namespace fastvae
