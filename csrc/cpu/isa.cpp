// The choice of an instruction set.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastvae {
namespace {

const Isa* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return &isa_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &isa_avx2();
#endif
  return &isa_baseline();
}

const Isa* named(const std::string& name) {
  static const Isa* const here = best();
  if (name == "baseline") return &isa_baseline();
#if defined(__x86_64__)
  const bool has_avx2 = here != &isa_baseline();  // AVX-512 machines have it
  if (name == "avx2" && has_avx2) return &isa_avx2();
  if (name == "avx512" && here == &isa_avx512()) return &isa_avx512();
#endif
  throw std::runtime_error("FASTVAE_CPU_ISA is '" + name + "', which is neither 'baseline' nor an instruction set of " +
                           "this machine, whose best is '" + here->name + "'");
}

}  // namespace

// Read at every call, so that a test can run each path in one process; getenv costs some ten nanoseconds.
const Isa& isa() {
  static const Isa* const here = best();
  const char* name = std::getenv("FASTVAE_CPU_ISA");
  return name && *name ? *named(name) : *here;
}

}  // namespace fastvae
