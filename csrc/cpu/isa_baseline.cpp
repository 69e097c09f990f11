// The kernels with what every machine of this architecture has: SSE2, NEON, or plain C++.
#define FASTVAE_ISA fastvae_baseline
#define FASTVAE_BYTES 16
#include "isa_table.h"

const fastvae::Isa& fastvae::isa_baseline() {
  static constexpr Isa table = {"baseline", fastvae_baseline::kKernels<float>, fastvae_baseline::kKernels<double>};
  return table;
}
