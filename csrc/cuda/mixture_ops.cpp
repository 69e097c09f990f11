// mixture_log_prob, its score and its gradients on CUDA devices: checks, allocation, registration.
#include "host.h"

namespace fastvae::cuda {
namespace {

void check(const Tensor& z, const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights,
           const std::optional<Tensor>& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  check_devices(z, {&mu, &logvar, log_weights ? &*log_weights : &z, exclude ? &*exclude : &z});
}

template <class T>
Mixture<T> mixture_of(const Tensor& z, const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights,
                      const std::optional<Tensor>& exclude) {
  return {input<T>(z),
          input<T>(mu),
          input<T>(logvar),
          input<T>(log_weights),
          input<int64_t>(exclude),
          z.size(0),
          mu.size(0),
          mu.size(1),
          logvar.size(0) != mu.size(0)};
}

// The allocator gives it back to this stream alone, after what was launched here.
template <class T, class F>
void with_scratch(const Tensor& like, int64_t numbers, const F& f) {
  const Tensor scratch = empty(like, {numbers});
  f(output<T>(scratch));
}

template <class T>
void forward(const Mixture<T>& mix, const Tensor& log_prob, const OnDeviceOf& device) {
  with_scratch<T>(log_prob, forward_scratch(mix),
                  [&](T* scratch) { mixture_forward(mix, scratch, output<T>(log_prob), device.stream()); });
}

template <class T>
void backward(const Mixture<T>& mix, const Gradients<T>& wanted, const Tensor& like, const OnDeviceOf& device) {
  with_scratch<T>(like, backward_scratch(mix, wanted),
                  [&](T* scratch) { mixture_backward(mix, wanted, scratch, device.stream()); });
}

Tensor log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar, const std::optional<Tensor>& log_weights,
                const std::optional<Tensor>& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const OnDeviceOf device(z);
  Tensor result = empty(z, {z.size(0)});
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    forward(mixture_of<T>(z, mu, logvar, log_weights, exclude), result, device);
  });
  return result;
}

// The score is the gradient in z for a gradient of one.
std::tuple<Tensor, Tensor> log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                              const std::optional<Tensor>& log_weights,
                                              const std::optional<Tensor>& exclude) {
  check(z, mu, logvar, log_weights, exclude);
  const OnDeviceOf device(z);
  Tensor result = empty(z, {z.size(0)}), score = torch::stable::empty_like(z);
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const Mixture<T> mix = mixture_of<T>(z, mu, logvar, log_weights, exclude);
    forward(mix, result, device);
    backward(mix, {input<T>(result), nullptr, false, output<T>(score), nullptr, nullptr, nullptr}, z, device);
  });
  return {result, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_prob_backward(const Tensor& grad, const Tensor& log_prob,
                                                             const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                             const std::optional<Tensor>& log_weights,
                                                             const std::optional<Tensor>& exclude, bool dense,
                                                             bool need_z, bool need_mu, bool need_logvar,
                                                             bool need_log_weights) {
  check(z, mu, logvar, log_weights, exclude);
  check_floats({&z, &grad, &log_prob});
  check_devices(z, {&grad, &log_prob});
  const int64_t M = z.size(0), K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M && log_prob.numel() == M, "fastvae: want grad and log_prob [M]");
  const OnDeviceOf device(z);
  const auto wanted = [&](bool need, std::vector<int64_t> size) {
    return empty(z, need ? size : std::vector<int64_t>{0});
  };
  Tensor dz = wanted(need_z, {M, D}), dmu = wanted(need_mu, {K, D}), dlogvar = wanted(need_logvar, {logvar.size(0), D}),
         dweights = wanted(need_log_weights, {K});
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    backward(mixture_of<T>(z, mu, logvar, log_weights, exclude),
             {input<T>(log_prob), input<T>(grad), dense, need_z ? output<T>(dz) : nullptr,
              need_mu ? output<T>(dmu) : nullptr, need_logvar ? output<T>(dlogvar) : nullptr,
              need_log_weights ? output<T>(dweights) : nullptr},
             z, device);
  });
  return {dz, dmu, dlogvar, dweights};
}

}  // namespace

FASTVAE_REGISTER(FASTVAE_CUDA_LIBRARY, FASTVAE_CUDA_KEY, m) {
  m.impl("mixture_log_prob", TORCH_BOX(&log_prob));
  m.impl("mixture_log_prob_and_score", TORCH_BOX(&log_prob_and_score));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&log_prob_backward));
}

}  // namespace fastvae::cuda
