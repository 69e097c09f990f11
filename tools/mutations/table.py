"""The mutations: mistakes that one can make, as small substitutions in the source.

Each `old` has to be there exactly once.  `tests` are the files that should notice, the likeliest first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


DENSITY = ("tests/backends/test_mixture.py", "tests/backends/test_mixture_edges.py")
ARGUMENTS = ("tests/backends/test_mixture_arguments.py",)
SAMPLING = ("tests/backends/test_gaussian.py", "tests/backends/test_mixture_kl.py")
CPU = (*DENSITY, *ARGUMENTS, "tests/backends/test_skipping.py", "tests/backends/test_order.py")
CUDA = ("tests/backends/test_emulated_smoke.py", "tests/backends/test_cuda.py", *CPU[:-1])
PRODUCTS = ("tests/backends/test_cuda_certificate.py", "tests/backends/test_cuda_precisions.py")
TRITON = (
    *("tests/backends/test_triton_smoke.py", "tests/backends/test_triton_small.py"),
    *("tests/backends/test_triton.py", *CPU[:-1]),
)


def cpu(name: str, file: str, old: str, new: str, why: str, tests: tuple[str, ...] = CPU) -> Mutation:
    return Mutation(f"cpu: {name}", f"csrc/cpu/{file}", old, new, why, tests)


def cuda(name: str, file: str, old: str, new: str, why: str, tests: tuple[str, ...] = CUDA) -> Mutation:
    return Mutation(f"cuda: {name}", f"csrc/cuda/{file}", old, new, why, tests)


def triton(name: str, file: str, old: str, new: str, why: str, tests: tuple[str, ...] = TRITON) -> Mutation:
    return Mutation(f"triton: {name}", f"kernels/{file}", old, new, why, tests)


def python(name: str, file: str, old: str, new: str, why: str, tests: tuple[str, ...]) -> Mutation:
    return Mutation(f"python: {name}", f"fastvae/{file}", old, new, why, tests)


MUTATIONS = [
    cpu(
        "earlier sums keep the old maximum",
        "mixture_forward.h",
        "  *total *= T(shrink);\n",
        "",
        "the online logsumexp mixes two scales",
    ),
    cpu(
        "dlogvar's second term with the wrong sign",
        "gradients.h",
        "T(-0.5) * weight",
        "T(0.5) * weight",
        "(t^2 - 1) / 2 becomes (t^2 + 1) / 2",
    ),
    cpu(
        "half the distance is enough to be left out",
        "tiles.h",
        "limit = reference + log_negligible;",
        "limit = reference + T(0.5) * log_negligible;",
        "what float32 can see is left out",
    ),
    cpu(
        "log t is ignored in the score",
        "tiles.h",
        "return limit - fastvae::log_t_bound(limit, chunk.max_c, chunk.max_log_sigma_ratio);",
        "return limit;",
        "a term that counts r t / sigma is left out as if it counted r / sigma",
        ("tests/backends/test_skipping.py", *CPU),
    ),
    cpu(
        "the log sigma ratio is ignored in the score",
        "mixture_forward.h",
        "exp_terms<T>(x, min_x<T>(limit[r] - scratch.log_sigma_ratio[tiles.panel[i]], reference[r]));",
        "exp_terms<T>(x, min_x<T>(limit[r], reference[r]));",
        "a faint narrow component is lost from the score",
        ("tests/backends/test_skipping.py", *CPU),
    ),
    cpu(
        "a lane past the last component is one",
        "panels.h",
        "i >= components.count ? minus_infinity",
        "i > components.count ? minus_infinity",
        "the padding of the last panel is not masked",
    ),
    cpu(
        "an absent component keeps its mean",
        "panels.h",
        "absent ? Vec<T>{} : x[i]",
        "x[i]",
        "NaN in a component of weight zero reaches others",
        ("tests/backends/test_mixture_edges.py",),
    ),
    cpu(
        "the last panel is dropped",
        "tiles.h",
        "  bool find(const T (&limit)[R]) {\n    for (count = 0; next_ < panels_ &&",
        "  bool find(const T (&limit)[R]) {\n    for (count = 0; next_ < panels_ - (panels_ > 2) &&",
        "the last components of a chunk are not looked at",
    ),
    cpu(
        "exclude is off by one",
        "tiles.h",
        "lane = exclude_[r] - first_ - next_",
        "lane = exclude_[r] + 1 - first_ - next_",
        "another component is left out",
        ("tests/backends/test_mixture_edges.py",),
    ),
    cpu(
        "exclude is not brought into order",
        "prepared.h",
        "k >= mixture.K ? -1 : index[k]",
        "k >= mixture.K ? -1 : k",
        "where components are in order another is left out",
        ("tests/backends/test_order.py",),
    ),
    cpu(
        "splits are added as they are",
        "mixture_tasks.h",
        "partial[i * stride].total * shrink;",
        "partial[i * stride].total;",
        "parts with different maxima are merged wrongly",
    ),
    cpu(
        "a shared logvar's gradient is the last panel's",
        "gradients.h",
        "task.dlogvar[d + i] += sum<T>(dlogvar[i]);",
        "task.dlogvar[d + i] = sum<T>(dlogvar[i]);",
        "the sum over components is lost",
        ARGUMENTS,
    ),
    cpu(
        "the score times two",
        "mixture_forward.h",
        "task.mixture.position, T(2), score)",
        "task.mixture.position, T(4), score)",
        "v is kept halved, and somebody forgets",
    ),
    cpu(
        "a second slab overwrites the first",
        "mixture_tasks.h",
        "b.add = begin > 0;",
        "b.add = false;",
        "the gradients of many rows are those of the last",
        ("tests/backends/test_mixture_edges.py",),
    ),
    cpu(
        "kept exponents forget the log sigma ratio",
        "tiles.h",
        "limit[r] - scratch_.log_sigma_ratio[next_], left_out);",
        "limit[r], left_out);",
        "gradients from kept exponents are not those computed again",
        ("tests/backends/test_exponents.py",),
    ),
    cpu(
        "Philox with another constant",
        "random_normal.h",
        "0xCD9E8D57",
        "0xCD9E8D59",
        "another stream: backends disagree",
        SAMPLING,
    ),
    cpu(
        "the noise begins a block late",
        "gaussian.h",
        "uint64_t(base_) / 4, numbers_",
        "uint64_t(base_) / 4 + 1, numbers_",
        "another part of the stream: backends disagree",
        SAMPLING,
    ),
    cpu(
        "the path derivative without its term in mu",
        "gaussian.h",
        "through_mu = g_z[i] - g_log_q * eps[i] / sigma[i];",
        "through_mu = g_z[i];",
        "sticking the landing does not stick",
        SAMPLING,
    ),
    cuda(
        "a barrier is left out of the tiles",
        "tile.cuh",
        "    __syncthreads();  // every thread's copies have arrived, and no thread reads the other stage any more\n",
        "",
        "a race in shared memory",
    ),
    cuda(
        "a barrier is left out of the small rows",
        "small_rows.cu",
        "  if (!task.dz_out) return;\n  __syncthreads();\n",
        "  if (!task.dz_out) return;\n",
        "a race in shared memory",
    ),
    cuda(
        "a merge forgets to shrink",
        "device_math.h",
        "other.total * exp_term(other.max - higher)",
        "other.total",
        "the sums of two threads have different scales",
    ),
    cuda(
        "exclude is off by one",
        "small_components.cu",
        "first + own == excluded",
        "first + own == excluded + 1",
        "backward leaves another component out",
    ),
    cuda(
        "exclude in the wrong tile",
        "tile.cuh",
        "component / Shape::kSide != panel",
        "component / Shape::kSide != 0",
        "components beyond the first tile are not left out, or others are",
    ),
    cuda(
        "dlogvar's sum has the wrong sign",
        "backward_sums.cuh",
        "T(fma(v[j], wuu[o][j], -sum))",
        "T(fma(v[j], wuu[o][j], sum))",
        "(t^2 - 1) / 2 becomes (t^2 + 1) / 2",
    ),
    cuda(
        "too much is left out",
        "mixture_backward.cu",
        "log_negligible<T>(mix.K)",
        "log_negligible<T>(mix.K, -12)",
        "what float32 can see is left out",
    ),
    cuda(
        "the log sigma ratio is ignored in the score",
        "mixture_backward.cuh",
        "max_log_sigma_ratio) - max_log_sigma_ratio;",
        "max_log_sigma_ratio);",
        "a faint narrow component is lost from the score",
        ("tests/backends/test_skipping.py",),
    ),
    cuda(
        "the bound on log t is ignored in the score",
        "mixture_backward.cuh",
        "limit - log_t_bound(limit, max_c, max_log_sigma_ratio) - ",
        "limit - ",
        "a faint far component is lost from the score",
        ("tests/backends/test_skipping.py",),
    ),
    cuda(
        "a NaN of an absent component",
        "pack.cu",
        "has_number ? mix.mu[other * mix.D + d] : T(0)",
        "other < mix.K && d < mix.D ? mix.mu[other * mix.D + d] : T(0)",
        "0 times NaN",
        ("tests/backends/test_mixture_edges.py",),
    ),
    cuda(
        "the path derivative without its square",
        "gaussian.cu",
        "subtracted[j] *= eps[j] * eps[j];",
        "",
        "sticking the landing does not stick",
        ("tests/backends/test_emulated_smoke.py", *SAMPLING),
    ),
    cuda(
        "products are always certified",
        "certificate.cuh",
        "kError = 24.0f",
        "kError = 0.0f",
        "where the expansion cancels, highest is as inexact as high",
        PRODUCTS,
    ),
    cuda(
        "pairs that are not certified keep the product's value",
        "certificate.cuh",
        "if ((lanes >> lane & 1) && rank < 4) assign(own);",
        "",
        "single pairs are as inexact as high",
        PRODUCTS,
    ),
    cuda(
        "lo hi is left out",
        "product_forward.cu",
        "multiply_add(part[n], x[n / 2][1], y[n % 2 * 2], y[n % 2 * 2 + 1]);",
        "",
        "high has the digits of medium in the rows",
        PRODUCTS,
    ),
    triton(
        "earlier sums keep the old maximum",
        "logsumexp.py",
        "total * shrink + tl.sum(p, 1), shrink, p",
        "total + tl.sum(p, 1), shrink, p",
        "the online logsumexp mixes two scales",
    ),
    triton(
        "exclude is off by one",
        "difference.py",
        "excluded[:, None] == columns[None, :]",
        "excluded[:, None] == columns[None, :] + 1",
        "another component is left out",
    ),
    triton(
        "dlogvar's sum has the wrong sign",
        "merge.py",
        "0.5 * (sum2 - sum0[:, None])",
        "0.5 * (sum2 + sum0[:, None])",
        "(t^2 - 1) / 2 becomes (t^2 + 1) / 2",
    ),
    triton(
        "splits are added as they are",
        "merge.py",
        "total += tl.load(partial_total + offset) * shrink",
        "total += tl.load(partial_total + offset)",
        "parts with different maxima are merged wrongly",
    ),
    triton(
        "half of the score's square term",
        "merge.py",
        "2.0 * square * scale - least",
        "square * scale - least",
        "the score of the lower precisions",
    ),
    triton(
        "the small kernel's last columns",
        "small_forward.py",
        "    for start in range(0, K, COLUMNS):\n        k = start",
        "    for start in range(0, K - COLUMNS + 1 if K > COLUMNS else K, COLUMNS):\n        k = start",
        "components of a tile that is not whole are dropped",
    ),
    triton(
        "sine for cosine",
        "noise.py",
        "(index & 1) != 0, sin, cos",
        "(index & 1) == 0, sin, cos",
        "where D is no multiple of four the noise is another",
        ("tests/backends/test_triton_smoke.py", *SAMPLING),
    ),
    triton(
        "the log sigma ratio is ignored in the score",
        "skipping.py",
        "limit - max_log_sigma_ratio - log_t_bound",
        "limit - log_t_bound",
        "a faint narrow component is lost from the score",
        ("tests/backends/test_skipping.py",),
    ),
    triton(
        "the bound on log t is ignored in the score",
        "skipping.py",
        " - log_t_bound(limit, tl.max(c, 0), max_log_sigma_ratio)",
        "",
        "a faint far component is lost from the score",
        ("tests/backends/test_skipping.py",),
    ),
    python(
        "the chunked backend's maximum",
        "backends/composite.py",
        "total * torch.exp(top - new_top)",
        "total",
        "the online logsumexp mixes two scales",
        ("tests/backends/test_composite.py",),
    ),
    python(
        "the gradient of kl reaches the prior as it is",
        "backends/from_parts.py",
        "grad = -grad_kl.flatten()",
        "grad = grad_kl.flatten()",
        "the prior is driven away",
        ("tests/backends/test_mixture_kl.py",),
    ),
    python(
        "IWAE is a sum",
        "bounds.py",
        "torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])",
        "torch.logsumexp(log_weights, 0)",
        "the bound grows by log S",
        ("tests/core/test_bounds.py",),
    ),
    python(
        "DReG scales once",
        "bounds.py",
        "return grad_z * scale[..., None], grad_log_q * scale",
        "return grad_z * scale[..., None], grad_log_q",
        "a biased gradient",
        ("tests/core/test_bounds.py",),
    ),
    python(
        "an exemplar counts itself out",
        "priors/exemplar.py",
        "math.log(K / (K - 1))",
        "math.log(K)",
        "leave-one-out weights do not add up to one",
        ("tests/core/test_exemplars.py",),
    ),
]
