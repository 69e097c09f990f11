// Kernels of the tests of the emulated tensor cores, each of one block.
#include "tensor_cores.cuh"

#include <utility>

#include "launch.cuh"

using namespace fastvae::cuda;

namespace {

int lane() { return int(threadIdx.x); }

uint32_t pair_of(__half x, __half y) {
  const __half2 pair = __halves2half2(x, y);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// sum [16, 8] += a [16, 16 n] b [16 n, 8]
void product(const __half* a, const __half* b, int n, float* sum) {
  const int group = lane() / 4, pair = lane() % 4 * 2;
  float own[4];
  for (int i = 0; i < 4; ++i) own[i] = sum[(group + i / 2 * 8) * 8 + pair + i % 2];
  for (int k = 0; k < 16 * n; k += 16) {
    uint32_t own_a[4], own_b[2];
    for (int i = 0; i < 4; ++i) {
      const __half* two = a + (group + i % 2 * 8) * 16 * n + k + pair + i / 2 * 8;
      own_a[i] = pair_of(two[0], two[1]);
    }
    for (int j = 0; j < 2; ++j) {
      const __half* two = b + (k + pair + 8 * j) * 8 + group;
      own_b[j] = pair_of(two[0], two[8]);
    }
    multiply_add(own, own_a, own_b[0], own_b[1]);
  }
  for (int i = 0; i < 4; ++i) sum[(group + i / 2 * 8) * 8 + pair + i % 2] = own[i];
}

// out [32, 4] of each lane, where lane i loads the row at offsets[i] of the given bytes in shared memory.
void load(const unsigned char* bytes, int size, const int* offsets, bool transposed, uint32_t* out) {
  for (int i = lane(); i < size; i += 32) shared_memory[i] = bytes[i];
  __syncthreads();
  uint32_t own[4];
  const void* row = shared_memory + offsets[lane()];
  if (transposed)
    load_matrices_transposed(own, row);
  else
    load_matrices(own, row);
  for (int i = 0; i < 4; ++i) out[lane() * 4 + i] = own[i];
}

void meet_at_different_operations() {
  float sum[4] = {};
  uint32_t a[4] = {};
  if (lane() == 7)
    load_matrices(a, shared_memory);
  else
    multiply_add(sum, a, 0, 0);
}

// out [9, 32]: what each lane got of each operation.
void exchanges(const int* values, int by, int* out) {
  const unsigned all = 0xFFFFFFFFu;
  const int own = values[lane()];
  const int got[] = {
      __shfl_sync(all, own, by),
      __shfl_up_sync(all, own, unsigned(by)),
      __shfl_down_sync(all, own, unsigned(by)),
      __shfl_xor_sync(all, own, by),
      __any_sync(all, own > by),
      __all_sync(all, own > by),
      int(__ballot_sync(all, own > by)),
  };
  for (int i = 0; i < int(std::size(got)); ++i) out[i * 32 + lane()] = got[i];
}

}  // namespace

extern "C" {

void run_product(const __half* a, const __half* b, int n, float* sum) {
  launch(nullptr, 1, 1, 32, 0, product, a, b, n, sum);
}

void run_load(const unsigned char* bytes, int size, const int* offsets, int transposed, uint32_t* out) {
  launch(nullptr, 1, 1, 32, size_t(size), load, bytes, size, offsets, bool(transposed), out);
}

void run_meet_at_different_operations() { launch(nullptr, 1, 1, 32, 1024, meet_at_different_operations); }

void run_exchanges(const int* values, int by, int* out) { launch(nullptr, 1, 1, 32, 0, exchanges, values, by, out); }

void to_half(const float* from, int n, __half* to) {
  for (int i = 0; i < n; ++i) to[i] = __float2half_rn(from[i]);
}

void to_float(const __half* from, int n, float* to) {
  for (int i = 0; i < n; ++i) to[i] = __half2float(from[i]);
}

int64_t matrix_bank_conflicts() { return emulation::matrix_bank_conflicts; }
}
