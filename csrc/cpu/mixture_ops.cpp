// mixture_log_prob, its score and its gradients on the CPU: the operators, which check, allocate and run the tasks.
#include "mixture_tasks.h"
#include "operators.h"

namespace fastvae {

Tensor mixture_log_prob(const Tensor& z, const Tensor& mu, const Tensor& logvar, const OptionalTensor& log_weights,
                        const OptionalTensor& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = new_result(z, {M});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, false, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), nullptr, {});
  });
  return log_prob;
}

std::tuple<Tensor, Tensor> mixture_log_prob_and_score(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                      const OptionalTensor& log_weights,
                                                      const OptionalTensor& exclude) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0);
  Tensor log_prob = new_result(z, {M}), score = new_result(z, {M, z.size(1)});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, true, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), output<T>(score), {});
  });
  return {log_prob, score};
}

namespace {

// How many exponents are kept of a row, if each row has room for per_row numbers: K, rounded up to whole panels.  With
// each 16 exponents comes room for one number more; there, after the exponents of all rows, lie the bytes of `active`.
// exponents_per_row in fastvae/operators.py computes per_row.
int64_t exponents_stride(int64_t per_row, int64_t K) {
  const int64_t stride = per_row / 17 * 16;
  STD_TORCH_CHECK(per_row == stride / 16 * 17 && stride % kMaxPanel == 0 && stride >= K && stride - K < kMaxPanel,
                  "fastvae: want exponents_per_row(K) numbers in a row of exponents, not ", per_row, " for K = ", K);
  return stride;
}

template <class T>
Exponents<T> exponents_in(const Tensor& kept, int64_t K) {
  static_assert(kMinPanel * sizeof(T) >= 16);  // room for a byte a tile
  const int64_t stride = exponents_stride(kept.size(1), K);
  T* a = output<T>(kept);
  return {a, reinterpret_cast<uint8_t*>(a + kept.size(0) * stride), stride};
}

}  // namespace

std::tuple<Tensor, Tensor> mixture_log_prob_and_exponents(const Tensor& z, const Tensor& mu, const Tensor& logvar,
                                                          const OptionalTensor& log_weights,
                                                          const OptionalTensor& exclude, bool need_z,
                                                          int64_t exponents_per_row) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  const int64_t M = z.size(0), K = mu.size(0);
  exponents_stride(exponents_per_row, K);
  Tensor log_prob = new_result(z, {M}), kept = new_result(z, {M, exponents_per_row});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, need_z, false);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    forward<T>(kernels, prepared, rows, M, output<T>(log_prob), nullptr, exponents_in<T>(kept, K));
  });
  return {log_prob, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from(
    const OptionalTensor& exponents, const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z,
    bool need_mu, bool need_logvar, bool need_log_weights) {
  check_mixture(z, mu, logvar, log_weights, exclude);
  check_floats({&z, &grad, &log_prob, exponents ? &*exponents : &z});
  STD_TORCH_CHECK(!exponents || (!dense && exponents->dim() == 2 && exponents->size(0) == z.size(0)),
                  "fastvae: want what mixture_log_prob_and_exponents kept");
  const int64_t M = z.size(0), K = mu.size(0), D = mu.size(1);
  STD_TORCH_CHECK(grad.numel() == M && log_prob.numel() == M, "fastvae: want grad and log_prob [M]");
  const auto wanted = [&](bool need, std::vector<int64_t> size) {
    if (!need) size = {0};
    return M ? new_result(z, size) : torch::stable::new_zeros(z, size);
  };
  Tensor dz = wanted(need_z, {M, D}), dmu = wanted(need_mu, {K, D}), dlogvar = wanted(need_logvar, {logvar.size(0), D}),
         dweights = wanted(need_log_weights, {K});
  by_dtype(z, [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const Prepared<T> prepared(mu, logvar, log_weights, M, need_z, dense);
    const Rows<T> rows(prepared, input<T>(z), input<int64_t>(exclude), M);
    std::vector<T> log_prob_memory, grad_memory;
    Backward<T> job{};
    job.mixture = prepared.mixture;
    job.z = rows.z;
    job.exclude = rows.exclude;
    job.log_prob = rows.reordered(input<T>(log_prob), log_prob_memory);
    job.grad = rows.reordered(input<T>(grad), grad_memory);
    if (exponents) job.exponents = exponents_in<T>(*exponents, K);
    job.dense = dense;
    backward<T>(kernels, job, rows, M,
                {need_z ? output<T>(dz) : nullptr, need_mu ? output<T>(dmu) : nullptr,
                 need_logvar ? output<T>(dlogvar) : nullptr, need_log_weights ? output<T>(dweights) : nullptr});
  });
  return {dz, dmu, dlogvar, dweights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward(
    const Tensor& grad, const Tensor& log_prob, const Tensor& z, const Tensor& mu, const Tensor& logvar,
    const OptionalTensor& log_weights, const OptionalTensor& exclude, bool dense, bool need_z, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  return mixture_log_prob_backward_from({}, grad, log_prob, z, mu, logvar, log_weights, exclude, dense, need_z, need_mu,
                                        need_logvar, need_log_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_log_prob_backward_from_exponents(
    const Tensor& grad, const Tensor& log_prob, const Tensor& exponents, const Tensor& z, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& log_weights, const OptionalTensor& exclude, bool need_z, bool need_mu,
    bool need_logvar, bool need_log_weights) {
  return mixture_log_prob_backward_from(exponents, grad, log_prob, z, mu, logvar, log_weights, exclude, false, need_z,
                                        need_mu, need_logvar, need_log_weights);
}

FASTVAE_REGISTER(FASTVAE_CPU_LIBRARY, CPU, m) {
  m.impl("mixture_log_prob", TORCH_BOX(&mixture_log_prob));
  m.impl("mixture_log_prob_and_score", TORCH_BOX(&mixture_log_prob_and_score));
  m.impl("mixture_log_prob_backward", TORCH_BOX(&mixture_log_prob_backward));
  m.impl("mixture_log_prob_and_exponents", TORCH_BOX(&mixture_log_prob_and_exponents));
  m.impl("mixture_log_prob_backward_from_exponents", TORCH_BOX(&mixture_log_prob_backward_from_exponents));
}

}  // namespace fastvae
