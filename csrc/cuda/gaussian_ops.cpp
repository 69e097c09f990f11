// gaussian_rsample and gaussian_kl on CUDA devices, with their gradients: checks, allocation, registration.
#include "host.h"

namespace fastvae::cuda {
namespace {

std::tuple<Tensor, Tensor> rsample(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t num_samples) {
  check_pair(mu, logvar);
  check_devices(mu, {&logvar, &seed});
  const OnDeviceOf device(mu);
  const int64_t M = mu.size(0), D = mu.size(1);
  Tensor z = empty(mu, {num_samples, M, D}), log_q = empty(mu, {num_samples, M});
  by_dtype(mu, [&](auto zero) {
    using T = decltype(zero);
    gaussian_rsample<T>(
        {input<T>(mu), input<T>(logvar), seed_of(seed), num_samples, M, D, output<T>(z), output<T>(log_q)},
        device.stream());
  });
  return {z, log_q};
}

std::tuple<Tensor, Tensor> rsample_backward(const Tensor& grad_z, const Tensor& grad_log_q, const Tensor& logvar,
                                            const Tensor& seed, bool path_derivative) {
  check_floats({&grad_z, &grad_log_q, &logvar});
  check_devices(logvar, {&grad_z, &grad_log_q, &seed});
  const OnDeviceOf device(logvar);
  const int64_t S = grad_z.size(0), M = logvar.size(0), D = logvar.size(1);
  STD_TORCH_CHECK(grad_z.numel() == S * M * D && grad_log_q.numel() == S * M,
                  "fastvae: want grad_z [S, M, D] and grad_log_q [S, M]");
  Tensor dmu = torch::stable::empty_like(logvar), dlogvar = torch::stable::empty_like(logvar);
  by_dtype(logvar, [&](auto zero) {
    using T = decltype(zero);
    gaussian_rsample_backward<T>({input<T>(grad_z), input<T>(grad_log_q), nullptr, input<T>(logvar), seed_of(seed),
                                  path_derivative, S, M, D, output<T>(dmu), output<T>(dlogvar)},
                                 device.stream());
  });
  return {dmu, dlogvar};
}

Tensor kl(const Tensor& mu, const Tensor& logvar) {
  check_pair(mu, logvar);
  check_devices(mu, {&logvar});
  const OnDeviceOf device(mu);
  const int64_t M = mu.size(0), D = mu.size(1);
  Tensor result = empty(mu, {M});
  by_dtype(mu, [&](auto zero) {
    using T = decltype(zero);
    gaussian_kl<T>({input<T>(mu), input<T>(logvar), M, D, output<T>(result), nullptr, nullptr, nullptr},
                   device.stream());
  });
  return result;
}

std::tuple<Tensor, Tensor> kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar) {
  check_pair(mu, logvar);
  check_floats({&mu, &grad});
  check_devices(mu, {&logvar, &grad});
  const OnDeviceOf device(mu);
  const int64_t M = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M, "fastvae: want grad [M]");
  Tensor dmu = torch::stable::empty_like(mu), dlogvar = torch::stable::empty_like(mu);
  by_dtype(mu, [&](auto zero) {
    using T = decltype(zero);
    gaussian_kl<T>({input<T>(mu), input<T>(logvar), M, D, nullptr, input<T>(grad), output<T>(dmu), output<T>(dlogvar)},
                   device.stream());
  });
  return {dmu, dlogvar};
}

}  // namespace

FASTVAE_REGISTER(FASTVAE_CUDA_LIBRARY, FASTVAE_CUDA_KEY, m) {
  m.impl("gaussian_rsample", TORCH_BOX(&rsample));
  m.impl("gaussian_rsample_backward", TORCH_BOX(&rsample_backward));
  m.impl("gaussian_kl", TORCH_BOX(&kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&kl_backward));
}

}  // namespace fastvae::cuda
