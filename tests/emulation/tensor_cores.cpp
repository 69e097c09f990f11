// Kernels that show what is emulated, each of one block: see tests/backends/test_emulated_tensor_cores.py.
#include "tensor_cores.cuh"

#include <cuda_pipeline.h>

#include <iterator>

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

// sum [48, 16] = a [48, 64] b [64, 16], as kernels do it.  Each of three warps has 16 rows.
void shared_product(const __half* a, const __half* b, float* sum) {
  constexpr int K = 64, N = 16;
  __half* const own_a = reinterpret_cast<__half*>(shared_memory);  // [48, 64], pieces of 8 at other places in each row
  __half* const own_b = own_a + 48 * K;                            // [64, 16]: rows r and r + 4 conflict
  const auto place = [](int row, int piece) { return row * K + (piece ^ (row & 7)) * 8; };
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int i = thread; i < 48 * K / 8; i += 96) __pipeline_memcpy_async(own_a + place(i / 8, i % 8), a + i * 8, 16);
  for (int i = thread; i < K * N / 8; i += 96) __pipeline_memcpy_async(own_b + i * 8, b + i * 8, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  float own[N / 8][4] = {};
  for (int k = 0; k < K; k += 16) {
    uint32_t some_a[4], some_b[4];
    load_matrices(some_a, own_a + place(warp * 16 + lane % 16, k / 8 + lane / 16));
    load_matrices_transposed(some_b, own_b + (k + lane % 16) * N + lane / 16 * 8);
    for (int n = 0; n < N / 8; ++n) multiply_add(own[n], some_a, some_b[2 * n], some_b[2 * n + 1]);
  }
  for (int n = 0; n < N / 8; ++n)
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(sum + (warp * 16 + lane / 4 + 8 * i) * N + n * 8 + lane % 4 * 2) =
          make_float2(own[n][2 * i], own[n][2 * i + 1]);
}

void meet_at_different_operations() {
  float sum[4] = {};
  uint32_t a[4] = {};
  if (lane() == 7)
    load_matrices(a, shared_memory);
  else
    multiply_add(sum, a, 0, 0);
}

// out [7, 32]: what each lane got of each operation.
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

// combined [3]: the sum, the largest or 0, and the bits of any; out [4, 64] of each value.
void rest(const int* values, int* combined, int* out) {
  const int i = int(threadIdx.x), own = __ldg(values + i);
  atomicAdd(combined, own);
  atomicMax(combined + 1, own);
  atomicOr(reinterpret_cast<unsigned*>(combined + 2), unsigned(own));
  out[i] = __popc(unsigned(own));
  out[64 + i] = __ffs(own);
  __stcs(out + 128 + i, __float_as_int(__int_as_float(own)));
  __stcg(out + 192 + i, int(__float_as_uint(__uint_as_float(unsigned(own)))));
}

}  // namespace

extern "C" {

void run_product(const __half* a, const __half* b, int n, float* sum) {
  launch(nullptr, 1, 1, 32, 0, product, a, b, n, sum);
}

void run_load(const unsigned char* bytes, int size, const int* offsets, int transposed, uint32_t* out) {
  launch(nullptr, 1, 1, 32, size_t(size), load, bytes, size, offsets, bool(transposed), out);
}

void run_shared_product(const __half* a, const __half* b, float* sum) {
  launch(nullptr, 1, 1, 96, (48 * 64 + 64 * 16) * sizeof(__half), shared_product, a, b, sum);
}

void run_rest(const int* values, int* combined, int* out) {
  cudaMemsetAsync(combined, 0, 3 * sizeof(int));
  launch(nullptr, 1, 1, 64, 0, rest, values, combined, out);
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
