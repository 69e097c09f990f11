// mixture_log_prob, its score, its gradients and mixture_kl on CUDA devices: checks, allocation, registration.
//
// The operators are the same at every precision.  kParts is 0 for "highest", where all is computed in the difference
// form; 2 and 1 are "high" and "medium", where the product form is taken for large problems in float32.
#include "host.h"
#include "plan.h"

namespace fastvae::cuda {
namespace {

void check(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
           const OptionalTensor& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  check_devices(z, {&mu, &logvar, log_weights ? &*log_weights : &z, exclude ? &*exclude : &z});
}

template <class T>
Mixture<T> mixture_of(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
                      const OptionalTensor& exclude) {
  return {input<T>(z), input<T>(mu), input<T>(logvar), input<T>(log_weights),       input<int64_t>(exclude),
          z.size(0),   mu.size(0),   mu.size(1),       logvar.size(0) != mu.size(0)};
}

// Calls f with scratch memory.  It is freed when f returns; the allocator then reuses it on this stream alone, behind
// all that f launched.
template <class T, class F>
void with_scratch(const Tensor& like, int64_t numbers, const F& f) {
  const Tensor scratch = empty(like, {numbers});
  f(output<T>(scratch));
}

template <int kParts, class T>
void backward(const Mixture<T>& mix, const Gradients<T>& wanted, const Tensor& like, const OnDeviceOf& device) {
  if constexpr (kParts > 0 && sizeof(T) == 4)
    if (!is_small(mix.M, mix.K, mix.D))
      return with_scratch<T>(like, product_backward_scratch<kParts>(mix, wanted), [&](T* scratch) {
        mixture_product_backward<kParts>(mix, wanted, nullptr, scratch, device.stream());
      });
  with_scratch<T>(like, backward_scratch(mix, wanted),
                  [&](T* scratch) { mixture_backward(mix, wanted, scratch, device.stream()); });
}

// The score is the gradient in z for an upstream gradient of one.
template <class T>
Gradients<T> score_of(const Tensor& log_prob, T* score) {
  return {input<T>(log_prob), nullptr, false, false, score, nullptr, nullptr, nullptr};
}

// Computes log p, and the score unless it is null.
template <int kParts, class T>
void forward(const Mixture<T>& mix, const Tensor& log_prob, T* score, const OnDeviceOf& device) {
  if (is_small(mix.M, mix.K, mix.D))
    return small_forward<T>({mix, nullptr, nullptr, output<T>(log_prob), score}, device.stream());
  if constexpr (kParts > 0 && sizeof(T) == 4) {
    if (score) {  // both in one pass
      const Gradients<T> wanted = score_of(log_prob, score);
      return with_scratch<T>(log_prob, product_backward_scratch<kParts>(mix, wanted), [&](T* scratch) {
        mixture_product_backward<kParts>(mix, wanted, output<T>(log_prob), scratch, device.stream());
      });
    }
    with_scratch<T>(log_prob, product_forward_scratch<kParts>(mix), [&](T* scratch) {
      mixture_product_forward<kParts>(mix, scratch, output<T>(log_prob), device.stream());
    });
  } else {
    with_scratch<T>(log_prob, forward_scratch(mix),
                    [&](T* scratch) { mixture_forward(mix, scratch, output<T>(log_prob), device.stream()); });
  }
  if (score) backward<kParts>(mix, score_of(log_prob, score), log_prob, device);
}

template <int kParts>
Tensor log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
                const OptionalTensor& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const OnDeviceOf device(z);
  Tensor result = empty(z, {z.size(0)});
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    forward<kParts, T>(mixture_of<T>(z, mu, logvar, log_weights, exclude), result, nullptr, device);
  });
  return result;
}

template <int kParts>
std::tuple<Tensor, Tensor> log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                              const OptionalTensor& log_weights, const OptionalTensor& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const OnDeviceOf device(z);
  Tensor result = empty(z, {z.size(0)}), score = torch::stable::empty_like(z);
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    forward<kParts>(mixture_of<T>(z, mu, logvar, log_weights, exclude), result, output<T>(score), device);
  });
  return {result, score};
}

// A gradient of the given size, or without elements where it is not wanted.
struct Wanted {
  Tensor tensor;
  bool needed;

  Wanted(const Tensor& like, bool needed, std::vector<int64_t> size)
      : tensor(empty(like, needed ? size : std::vector<int64_t>{0})), needed(needed) {}
  template <class T>
  T* data() const {
    return needed ? output<T>(tensor) : nullptr;
  }
};

template <int kParts>
std::tuple<Tensor, Tensor, Tensor, Tensor> log_prob_backward(const Tensor& grad, const Tensor& log_prob,
                                                             const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                             const OptionalTensor& log_weights,
                                                             const OptionalTensor& exclude, bool dense, bool need_z,
                                                             bool need_mu, bool need_logvar, bool need_log_weights) {
  check(z, mu, logvar, log_weights, exclude);
  check_floats({&z, &grad, &log_prob});
  check_devices(z, {&grad, &log_prob});
  const int64_t M = z.size(0), K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M && log_prob.numel() == M, "fastvae: want grad and log_prob [M]");
  const OnDeviceOf device(z);
  const Wanted dz(z, need_z, {M, D}), dmu(z, need_mu, {K, D}), dlogvar(z, need_logvar, {logvar.size(0), D}),
      dweights(z, need_log_weights, {K});
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    backward<kParts, T>(mixture_of<T>(z, mu, logvar, log_weights, exclude),
                        {input<T>(log_prob), input<T>(grad), false, dense, dz.data<T>(), dmu.data<T>(),
                         dlogvar.data<T>(), dweights.data<T>()},
                        z, device);
  });
  return {dz.tensor, dmu.tensor, dlogvar.tensor, dweights.tensor};
}

// Samples as the rows of a mixture: [S, M, D] -> [S M, D].
Tensor flat(const Tensor& z) { return torch::stable::view(z, {z.size(0) * z.size(1), z.size(2)}); }

template <int kParts>
std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_kl(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                      int64_t num_samples, const Tensor& prior_mu,
                                                      const Tensor& prior_logvar, const OptionalTensor& log_weights,
                                                      const OptionalTensor& exclude, bool with_score) {
  check_pair(mu, logvar);
  check_devices(mu, {&logvar, &seed});
  const int64_t M = mu.size(0), D = mu.size(1);
  Tensor z = empty(mu, {num_samples, M, D}), kl = empty(mu, {num_samples, M});
  const Tensor rows = flat(z), log_prob = empty(mu, {num_samples * M});
  check(rows, prior_mu, prior_logvar, log_weights, exclude);
  const OnDeviceOf device(mu);
  const Wanted score(mu, with_score, {num_samples * M, D});
  by_dtype(mu, [&](auto zero) {
    using T = decltype(zero);
    const Mixture<T> mix = mixture_of<T>(rows, prior_mu, prior_logvar, log_weights, exclude);
    T* log_q = output<T>(kl);  // until log p is subtracted
    const Sample<T> sample{input<T>(mu), input<T>(logvar), seed_of(seed), num_samples, M, D, output<T>(z), log_q};
    if (is_small(mix.M, mix.K, mix.D))
      return small_forward<T>({mix, &sample, output<T>(kl), output<T>(log_prob), score.data<T>()}, device.stream());
    gaussian_rsample(sample, device.stream());
    forward<kParts>(mix, log_prob, score.data<T>(), device);
    kl = torch::stable::subtract(kl, torch::stable::view(log_prob, {num_samples, M}));
  });
  return {z, kl, log_prob, score.tensor};
}

template <int kParts>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixture_kl_backward(
    const OptionalTensor& grad_z, const Tensor& grad_kl, const Tensor& logvar, const Tensor& seed, bool path_derivative,
    const Tensor& z, const Tensor& log_prob, const Tensor& score, const Tensor& prior_mu, const Tensor& prior_logvar,
    const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_q, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  check_floats({&z, &grad_kl, &logvar, &log_prob, &score, grad_z ? &*grad_z : &z});
  check_devices(z, {&grad_kl, &logvar, &seed, &log_prob, &score, grad_z ? &*grad_z : &z});
  STD_TORCH_CHECK(z.dim() == 3, "fastvae: want z [S, M, D]");
  const int64_t S = z.size(0), M = z.size(1), D = z.size(2), K = prior_mu.size(0);
  STD_TORCH_CHECK(grad_kl.numel() == S * M && log_prob.numel() == S * M && logvar.numel() == M * D &&
                      (!grad_z || grad_z->numel() == z.numel()) && (score.numel() == 0 || score.numel() == z.numel()),
                  "fastvae: want z and grad_z [S, M, D], grad_kl [S, M], log_prob [S M] and score [S M, D]");
  const Tensor rows = flat(z);
  check(rows, prior_mu, prior_logvar, log_weights, exclude);
  const OnDeviceOf device(z);
  const Wanted dmu(z, need_q, {M, D}), dlogvar(z, need_q, {M, D}), dprior_mu(z, need_mu, {K, D}),
      dprior_logvar(z, need_logvar, {prior_logvar.size(0), D}), dlog_weights(z, need_log_weights, {K});
  const Wanted own_score(z, need_q && score.numel() == 0, {S * M, D});  // where forward made none
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const Mixture<T> mix = mixture_of<T>(rows, prior_mu, prior_logvar, log_weights, exclude);
    if (own_score.needed) backward<kParts>(mix, score_of(log_prob, own_score.data<T>()), log_prob, device);
    if (need_q)
      gaussian_rsample_backward<T>(
          {input<T>(grad_z), input<T>(grad_kl), input<T>(own_score.needed ? own_score.tensor : score), input<T>(logvar),
           seed_of(seed), path_derivative, S, M, D, output<T>(dmu.tensor), output<T>(dlogvar.tensor)},
          device.stream());
    backward<kParts, T>(mix,
                        {input<T>(log_prob), input<T>(grad_kl), true, dense, nullptr, dprior_mu.data<T>(),
                         dprior_logvar.data<T>(), dlog_weights.data<T>()},
                        z, device);
  });
  return {dmu.tensor, dlogvar.tensor, dprior_mu.tensor, dprior_logvar.tensor, dlog_weights.tensor};
}

}  // namespace

FASTVAE_REGISTER(FASTVAE_CUDA_LIBRARY, FASTVAE_CUDA_KEY, m) {
  m.impl("mixture_log_prob", TORCH_BOX(&log_prob<0>));
  m.impl("mixture_log_prob_and_score", TORCH_BOX(&log_prob_and_score<0>));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&log_prob_backward<0>));
  m.impl("mixture_kl", TORCH_BOX(&mixture_kl<0>));
  m.impl("mixture_kl_backward", TORCH_BOX(&mixture_kl_backward<0>));
  m.impl("cuda_high_mixture_log_prob", TORCH_BOX(&log_prob<2>));
  m.impl("cuda_high_mixture_log_prob_and_score", TORCH_BOX(&log_prob_and_score<2>));
  m.impl("cuda_high_mixture_log_prob_backward", TORCH_BOX(&log_prob_backward<2>));
  m.impl("cuda_high_mixture_kl", TORCH_BOX(&mixture_kl<2>));
  m.impl("cuda_high_mixture_kl_backward", TORCH_BOX(&mixture_kl_backward<2>));
  m.impl("cuda_medium_mixture_log_prob", TORCH_BOX(&log_prob<1>));
  m.impl("cuda_medium_mixture_log_prob_and_score", TORCH_BOX(&log_prob_and_score<1>));
  m.impl("cuda_medium_mixture_log_prob_backward", TORCH_BOX(&log_prob_backward<1>));
  m.impl("cuda_medium_mixture_kl", TORCH_BOX(&mixture_kl<1>));
  m.impl("cuda_medium_mixture_kl_backward", TORCH_BOX(&mixture_kl_backward<1>));
}

}  // namespace fastvae::cuda
