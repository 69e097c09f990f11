// What csrc/cuda/tensor_cores.cuh offers, on the CPU.
//
// Each lane shows its part of the matrices, and the first lane to go on does the work of the whole warp: memory is read
// at one moment, as by the instruction, and a product is one loop over matrices.
//
// How a tensor core rounds is not documented.  FASTVAE_EMULATION_SUMS says what multiply_add does:
//
//   truncating  the default, what is known of the hardware, at its worst.  Fasi, Higham, Mikaitis and Pranesh,
//               "Numerical behavior of NVIDIA tensor cores", found that the old sum and some products are aligned to
//               the largest of them, cut off towards zero, added exactly, and the result cut off again to fp32.
//               Devices since the A100 add 8 products at a time with one bit more than fp32 has, or 16 with two bits
//               more.  Here they are 8, so that a sum is cut off twice, with no bits more.
//   exact       the sum rounded to fp32 once, to the nearest.  A product of fp16 numbers is exact in double, and their
//               sum in double is wrong by less than 17 units of 2^-53 of the largest partial sum.  So the fp32 number
//               is another only if the exact sum is that close to a tie, or if nearly all of it cancels.
#pragma once

#include <cuda_fp16.h>

namespace emulation {

inline int64_t matrix_bank_conflicts = 0;  // so far

// What the lanes of a warp show each other.
struct WarpMatrices {
  bool done;  // by the lane that goes on first
  float a[16][16], b[16][8], sum[16][8];
  const unsigned char* rows[4][8];  // of the matrices to load
  uint16_t loaded[4][8][8];
};
inline WarpMatrices warp_matrices[2][1024 / 32];  // in turn, as slots are

// The lane shows; then the first lane that goes on works for all; then all see.
template <class Show, class Work, class See>
void warp_work(Operation operation, const Show& show, const Work& work, const See& see) {
  const unsigned warp = block.current / 32, lane = block.current % 32;
  const unsigned turn = warp_meet(0xFFFFFFFFu, operation, [&](unsigned turn) {
    warp_matrices[turn][warp].done = false;
    show(warp_matrices[turn][warp], lane);
  });
  WarpMatrices& matrices = warp_matrices[turn][warp];
  if (!matrices.done) work(matrices);
  matrices.done = true;
  see(matrices, lane);
}

// Shared memory gives 128 bytes at once, each 16 of them from one place modulo 128.  So the rows of a matrix take as
// many turns as there are different rows at one such place.
inline int turns(const unsigned char* const (&rows)[8]) {
  int most = 0;
  for (int i = 0; i < 8; ++i) {
    int same_place = 1;
    for (int j = 0; j < i; ++j) {
      const bool repeated = std::find(rows, rows + j, rows[j]) != rows + j;
      same_place += !repeated && rows[j] != rows[i] && (rows[j] - rows[i]) % 128 == 0;
    }
    most = std::max(most, same_place);
  }
  return most;
}

inline void load_rows(WarpMatrices& matrices) {
  for (int i = 0; i < 4; ++i) {
    for (int row = 0; row < 8; ++row) {
      const int64_t offset = int64_t(matrices.rows[i][row]) - int64_t(fastvae::cuda::shared_memory);
      if (offset < 0 || offset + 16 > int64_t(shared_bytes)) fail("a matrix's row lies outside shared memory");
      if (offset % 16) fail("a matrix's row is misaligned");
      std::memcpy(matrices.loaded[i][row], matrices.rows[i][row], 16);
    }
    matrix_bank_conflicts += turns(matrices.rows[i]) - 1;
  }
}

template <class T>
using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;  // one for each column; a cast keeps the bits

// sum[j] += a[0] b[0][j] + ... + a[15] b[15][j]
inline void add_exactly(float (&sum)[8], const float (&a)[16], const float (&b)[16][8]) {
  Eight<float> row;
  std::memcpy(&row, sum, sizeof(row));
  Eight<double> exact = __builtin_convertvector(row, Eight<double>);
  for (int k = 0; k < 16; ++k) {
    std::memcpy(&row, b[k], sizeof(row));
    exact += __builtin_convertvector(row * a[k], Eight<double>);  // a product is exact in float as well
  }
  row = __builtin_convertvector(exact, Eight<float>);
  std::memcpy(sum, &row, sizeof(row));
}

// sum[j] += a[0] b[0][j] + ... + a[7] b[7][j]
inline void add_truncating(float (&sum)[8], const float* a, const float (*b)[8]) {
  constexpr uint32_t kExponent = 0x7F800000;  // of a float, 127 more than that of 2
  Eight<float> old, products[8];
  std::memcpy(&old, sum, sizeof(old));
  Eight<float> simple = old;
  Eight<uint32_t> of_products{};  // the largest exponent
  for (int k = 0; k < 8; ++k) {
    std::memcpy(&products[k], b[k], sizeof(old));
    products[k] *= a[k];  // is exact: 22 bits at most
    simple += products[k];
    const Eight<uint32_t> exponent = Eight<uint32_t>(products[k]) & kExponent;
    of_products = exponent > of_products ? exponent : of_products;
  }
  const Eight<uint32_t> of_old = Eight<uint32_t>(old) & kExponent;
  const Eight<uint32_t> largest = of_old > of_products ? of_old : of_products;
  // A product is 0 or at least 2^-48, so that neither leaves the range of floats where some product is not 0.
  const Eight<float> unit = Eight<float>(largest - (23u << 23));  // the last of 24 bits
  const Eight<float> units = Eight<float>((277u << 23) - largest);  // 1 / unit, since 277 = 127 + 127 + 23
  Eight<int32_t> total = __builtin_convertvector(old * units, Eight<int32_t>);  // towards zero
  for (int k = 0; k < 8; ++k) total += __builtin_convertvector(products[k] * units, Eight<int32_t>);

  const Eight<float> nearest = __builtin_convertvector(total, Eight<float>);
  const Eight<int32_t> back = __builtin_convertvector(nearest, Eight<int32_t>);
  const Eight<int32_t> away = (total < 0 ? -back : back) > (total < 0 ? -total : total);  // -1 where it is so
  const Eight<float> result = Eight<float>(Eight<int32_t>(nearest) + away) * unit;
  const Eight<float> sums = (largest == kExponent) | (of_products == 0) ? simple : result;  // infinity and NaN; old + 0
  std::memcpy(sum, &sums, sizeof(sums));
}

inline void multiply_add(WarpMatrices& matrices) {
  for (int i = 0; i < 16; ++i)
    if (exact_sums) {
      add_exactly(matrices.sum[i], matrices.a[i], matrices.b);
    } else {
      add_truncating(matrices.sum[i], matrices.a[i], matrices.b);
      add_truncating(matrices.sum[i], matrices.a[i] + 8, matrices.b + 8);
    }
}

// Two fp16 numbers of a register.
inline float2 numbers(uint32_t bits) {
  return {__half2float({uint16_t(bits)}), __half2float({uint16_t(bits >> 16)})};
}

template <class See>
void load_matrices(Operation operation, const void* row, const See& see) {
  const auto show = [&](WarpMatrices& matrices, unsigned lane) {
    matrices.rows[lane / 8][lane % 8] = static_cast<const unsigned char*>(row);
  };
  warp_work(operation, show, load_rows, see);
}

}  // namespace emulation

namespace fastvae::cuda {

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulation::load_matrices(emulation::Operation::load_matrices, row, [&](const auto& matrices, unsigned lane) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* pair = &matrices.loaded[i][lane / 4][lane % 4 * 2];
      out[i] = pair[0] | uint32_t(pair[1]) << 16;
    }
  });
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  emulation::load_matrices(emulation::Operation::load_transposed, row, [&](const auto& matrices, unsigned lane) {
    for (int i = 0; i < 4; ++i) {
      const auto* pair = &matrices.loaded[i][lane % 4 * 2];
      out[i] = pair[0][lane / 4] | uint32_t(pair[1][lane / 4]) << 16;
    }
  });
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto show = [&](emulation::WarpMatrices& matrices, unsigned lane) {
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        const float2 x = emulation::numbers(a[2 * j + i]);
        matrices.a[group + 8 * i][pair + 8 * j] = x.x;
        matrices.a[group + 8 * i][pair + 8 * j + 1] = x.y;
        matrices.sum[group + 8 * i][pair + j] = sum[2 * i + j];
      }
    for (int j = 0; j < 2; ++j) {
      const float2 x = emulation::numbers(j ? b1 : b0);
      matrices.b[pair + 8 * j][group] = x.x;
      matrices.b[pair + 8 * j + 1][group] = x.y;
    }
  };
  const auto see = [&](const emulation::WarpMatrices& matrices, unsigned lane) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) sum[2 * i + j] = matrices.sum[lane / 4 + 8 * i][lane % 4 * 2 + j];
  };
  emulation::warp_work(emulation::Operation::multiply_add, show, emulation::multiply_add, see);
}

}  // namespace fastvae::cuda
