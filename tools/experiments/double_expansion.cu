// The expansion sum_d z^2 v - 2 z mu v as a matrix product in double precision on tensor cores: what the inner loop of
// such a kernel would be.  It is compiled for the static report and never run; the page on the CUDA
// kernels has the conclusion.
//
// A warp has 64 rows x 32 components: with [z^2, z] and [v, -2 mu v] in shared memory, four dimensions are eight loads a
// lane and 4 x 4 x 2 products of 16 x 8 x 4.
constexpr int kDepth = 8, kRows = 64, kColumns = 32;  // kDepth: of the inner dimension, 2 D

__global__ void __launch_bounds__(256, 1)
    double_expansion(const double* left, const double* right, double* out, int n) {
  __shared__ double a[kDepth][kRows + 4], b[kDepth][kColumns + 4];
  const int lane = threadIdx.x % 32, group = lane / 4, within = lane % 4;
  double sum[4][4][4] = {};
  for (int stage = 0; stage < n; ++stage) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDepth * kRows; i += 256) a[i / kRows][i % kRows] = left[stage * kDepth * kRows + i];
    for (int i = threadIdx.x; i < kDepth * kColumns; i += 256)
      b[i / kColumns][i % kColumns] = right[stage * kDepth * kColumns + i];
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4) {
      double x[4][2], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i][0] = a[k + within][16 * i + group];
        x[i][1] = a[k + within][16 * i + group + 8];
        y[i] = b[k + within][8 * i + group];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          double (&c)[4] = sum[i][j];
          asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
              : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
              : "d"(x[i][0]), "d"(x[i][1]), "d"(y[j]));
        }
      }
    }
  }
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = sum[i / 16][i / 4 % 4][i % 4];
}
