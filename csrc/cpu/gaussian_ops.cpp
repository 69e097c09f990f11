// gaussian_rsample and gaussian_kl on the CPU, with their gradients: checks, tasks, registration.
#include <string>

#include "operators.h"

namespace fastvae {
namespace {

// f(begin, end) over pieces of `rows` rows of D numbers, large enough to be worth a thread.
template <class F>
void run_rows(int64_t rows, int64_t D, const F& f) {
  run_pieces(rows, std::max<int64_t>(1, (1 << 13) / D), f);
}

// Whether a result is so large that the caches would not hold it until it is read.
bool is_large(const Tensor& t) {
  constexpr int64_t kCached = 8 << 20;  // bytes
  return t.numel() * int64_t(t.element_size()) > kCached;
}

uint64_t seed_of(const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "fastvae: want one int64 seed");
  return uint64_t(*input<int64_t>(seed));
}

}  // namespace

std::tuple<Tensor, Tensor> gaussian_rsample(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                            int64_t num_samples) {
  check_pair(mu, logvar);
  const int64_t M = mu.size(0), D = mu.size(1);
  Tensor z = new_result(mu, {num_samples, M, D}), log_q = new_result(mu, {num_samples, M});
  by_dtype(mu, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    run_rows(num_samples * M, D, [&](int64_t begin, int64_t end) {
      kernels.gaussian_rsample({input<T>(mu), input<T>(logvar), seed_of(seed), M, D, begin, end, output<T>(z),
                                output<T>(log_q), is_large(z)});
    });
  });
  return {z, log_q};
}

std::tuple<Tensor, Tensor> gaussian_rsample_backward(const Tensor& grad_z, const Tensor& grad_log_q,
                                                     const Tensor& logvar, const Tensor& seed, bool path_derivative) {
  check_floats({&grad_z, &grad_log_q, &logvar});
  const int64_t S = grad_z.size(0), M = logvar.size(0), D = logvar.size(1);
  STD_TORCH_CHECK(grad_z.numel() == S * M * D && grad_log_q.numel() == S * M,
                  "fastvae: want grad_z [S, M, D] and grad_log_q [S, M]");
  Tensor dmu = new_result(logvar, {M, D}), dlogvar = new_result(logvar, {M, D});
  by_dtype(logvar, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    run_rows(M, S * D, [&](int64_t begin, int64_t end) {
      kernels.gaussian_rsample_backward({input<T>(grad_z), input<T>(grad_log_q), input<T>(logvar), seed_of(seed),
                                         path_derivative, S, M, D, begin, end, output<T>(dmu), output<T>(dlogvar),
                                         is_large(dmu)});
    });
  });
  return {dmu, dlogvar};
}

namespace {

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar) {
  check_pair(mu, logvar);
  const int64_t M = mu.size(0), D = mu.size(1);
  Tensor kl = new_result(mu, {M});
  by_dtype(mu, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    run_rows(M, D, [&](int64_t begin, int64_t end) {
      kernels.gaussian_kl(input<T>(mu) + begin * D, input<T>(logvar) + begin * D, end - begin, D,
                          output<T>(kl) + begin);
    });
  });
  return kl;
}

std::tuple<Tensor, Tensor> gaussian_kl_backward(const Tensor& grad, const Tensor& mu, const Tensor& logvar) {
  check_pair(mu, logvar);
  check_floats({&mu, &grad});
  const int64_t M = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M, "fastvae: want grad [M]");
  Tensor dmu = new_result(mu, {M, D}), dlogvar = new_result(mu, {M, D});
  by_dtype(mu, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    run_rows(M, D, [&](int64_t begin, int64_t end) {
      kernels.gaussian_kl_backward({input<T>(grad), input<T>(mu), input<T>(logvar), D, begin, end, output<T>(dmu),
                                    output<T>(dlogvar), is_large(dmu)});
    });
  });
  return {dmu, dlogvar};
}

std::string cpu_isa() { return isa().name; }

}  // namespace

FASTVAE_REGISTER(FASTVAE_CPU_LIBRARY, CPU, m) {
  m.impl("gaussian_rsample", TORCH_BOX(&gaussian_rsample));
  m.impl("gaussian_rsample_backward", TORCH_BOX(&gaussian_rsample_backward));
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

// No tensor tells its device, so it is registered for all of them.
FASTVAE_REGISTER(FASTVAE_CPU_LIBRARY, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace fastvae
