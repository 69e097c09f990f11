// What csrc/cuda/tensor_cores.cuh offers, on the CPU.
//
// Each lane shows its part of the matrices, and the first lane to go on does the work of the whole warp: memory is read
// at one moment, as by the instruction, and a product is one loop over matrices.
//
// How a tensor core rounds is not documented.  FASTVAE_EMULATION_SUMS says what multiply_add does:
//
//   truncating  the default: what was found out about the hardware, at its worst.  The old sum and some products are
//               aligned to the largest of them, cut off towards zero and added exactly; the result is cut off to fp32.
//               Of all devices since the A100, some add 8 products at a time and align to one bit more than fp32 has;
//               others add 16 or more and align to two bits more.  Here they are 8 and no bits more: two additions,
//               each of which cuts off at least as much as any device's.  A subnormal factor counts in full, but the
//               product is aligned as if the factor were the least normal number.  See Fasi, Higham, Mikaitis and
//               Pranesh, "Numerical behavior of NVIDIA tensor cores", and Khattak and Mikaitis, "Accurate models of
//               NVIDIA tensor cores".
//   exact       the sum rounded to fp32 once, to the nearest.  A product of fp16 numbers is exact in double, and their
//               sum in double is wrong by at most 16 units of 2^-53 of the largest partial sum.  So the fp32 number is
//               another only if the exact sum is that close to a tie, or if nearly all of it cancels.
#pragma once

#include <cuda_fp16.h>

namespace emulation {

inline int64_t matrix_bank_conflicts = 0;  // wavefronts beyond one for each matrix, so far

// What the lanes of a warp show each other.
struct WarpMatrices {
  bool done;  // the work, by the lane that goes on first
  float a[16][16], b[16][8], sum[16][8];
  float a_size[16][16], b_size[16][8];  // what a and b are aligned as
  const unsigned char* rows[4][8];      // of the matrices to load
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

// How many wavefronts a matrix takes.  One has 128 bytes, each 16 of them from one place modulo 128, so that there are
// as many as there are different rows at one place.
inline int wavefronts(const unsigned char* const (&rows)[8]) {
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
    matrix_bank_conflicts += wavefronts(matrices.rows[i]) - 1;
  }
}

template <class T>
using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;  // one for each column; a cast keeps the bits

// sum[i][j] += a[i][0] b[0][j] + ... + a[i][15] b[15][j]
inline void add_exactly(WarpMatrices& matrices, int i) {
  Eight<float> row;
  std::memcpy(&row, matrices.sum[i], sizeof(row));
  Eight<double> exact = __builtin_convertvector(row, Eight<double>);
  for (int k = 0; k < 16; ++k) {
    std::memcpy(&row, matrices.b[k], sizeof(row));
    exact += __builtin_convertvector(row * matrices.a[i][k], Eight<double>);  // a product is exact in float as well
  }
  row = __builtin_convertvector(exact, Eight<float>);
  std::memcpy(matrices.sum[i], &row, sizeof(row));
}

// sum[i][j] += a[i][k] b[k][j] + ... + a[i][k + 7] b[k + 7][j]
inline void add_truncating(WarpMatrices& matrices, int i, int k) {
  constexpr uint32_t kExponent = 0x7F800000;
  Eight<float> old, products[8];
  std::memcpy(&old, matrices.sum[i], sizeof(old));
  Eight<float> simple = old;
  Eight<uint32_t> size{};  // the largest, whose order is that of its bits
  for (int n = 0; n < 8; ++n) {
    Eight<float> of_product;
    std::memcpy(&products[n], matrices.b[k + n], sizeof(old));
    std::memcpy(&of_product, matrices.b_size[k + n], sizeof(old));
    products[n] *= matrices.a[i][k + n];  // is exact: 22 bits at most
    of_product *= matrices.a_size[i][k + n];
    simple += products[n];
    size = Eight<uint32_t>(of_product) > size ? Eight<uint32_t>(of_product) : size;
  }
  const Eight<uint32_t> of_products = size & kExponent, of_old = Eight<uint32_t>(old) & kExponent;
  const Eight<uint32_t> largest = of_old > of_products ? of_old : of_products;
  // The size of a product is 0 or at least 2^-28, so that these are floats wherever they are used.
  const Eight<float> unit = Eight<float>(largest - (23u << 23));       // the last of 24 bits
  const Eight<float> per_unit = Eight<float>((277u << 23) - largest);  // 1 / unit, since 277 = 127 + 127 + 23
  Eight<int32_t> total = __builtin_convertvector(old * per_unit, Eight<int32_t>);  // towards zero
  for (int n = 0; n < 8; ++n) total += __builtin_convertvector(products[n] * per_unit, Eight<int32_t>);

  const Eight<float> nearest = __builtin_convertvector(total, Eight<float>);
  const Eight<int32_t> back = __builtin_convertvector(nearest, Eight<int32_t>);
  const Eight<int32_t> away = (total < 0 ? -back : back) > (total < 0 ? -total : total);  // -1 where it is so
  const Eight<float> result = Eight<float>(Eight<int32_t>(nearest) + away) * unit;
  const Eight<int32_t> not_finite = largest == kExponent, nothing_new = of_products == 0;
  const Eight<float> sum = not_finite | nothing_new ? simple : result;
  std::memcpy(matrices.sum[i], &sum, sizeof(sum));
}

inline void multiply_add(WarpMatrices& matrices) {
  for (int i = 0; i < 16; ++i)
    if (exact_sums) {
      add_exactly(matrices, i);
    } else {
      add_truncating(matrices, i, 0);
      add_truncating(matrices, i, 8);
    }
}

inline void decode(uint16_t bits, float& number, float& size) {
  number = __half2float({bits});
  size = number == 0 ? 0.0f : fabsf(number) < 0x1p-14f ? 0x1p-14f : fabsf(number);
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
    for (int e = 0; e < 2; ++e)  // of the two numbers in a register
      for (int j = 0; j < 2; ++j) {
        const unsigned k = pair + 8 * j + e;
        for (int i = 0; i < 2; ++i) {
          const unsigned row = group + 8 * i;
          emulation::decode(uint16_t(a[2 * j + i] >> 16 * e), matrices.a[row][k], matrices.a_size[row][k]);
        }
        emulation::decode(uint16_t((j ? b1 : b0) >> 16 * e), matrices.b[k][group], matrices.b_size[k][group]);
      }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) matrices.sum[group + 8 * i][pair + j] = sum[2 * i + j];
  };
  const auto see = [&](const emulation::WarpMatrices& matrices, unsigned lane) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) sum[2 * i + j] = matrices.sum[lane / 4 + 8 * i][lane % 4 * 2 + j];
  };
  emulation::warp_work(emulation::Operation::multiply_add, show, emulation::multiply_add, see);
}

}  // namespace fastvae::cuda
