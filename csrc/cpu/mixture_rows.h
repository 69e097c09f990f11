// What forward and backward of the mixture density do alike with the rows of z.
//
//   u_mkd = z_md - mu_kd    v_kd = exp(-logvar_kd)    c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d u^2 v                      l_m = logsumexp_k a_mk
//   w_mk = g_m exp(a_mk - l_m)
//   dz_md = -sum_k w u v    dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)
//
// Components are packed chunk by chunk into scratch memory that stays in the cache (panels.h), and all rows of the task
// use a chunk before the next one is packed.  The rows of a tile work on a batch of panels in phases, each of which
// keeps the multipliers busy: the exponents of the active tiles (tiles.h), then all their exponentials, then the
// gradients from these (gradients.h).  Backward computes the exponents again, unless M x K is so small that forward
// kept them; nothing else of that size exists.  docs/developers/cpu-kernels.md has the reasons.
#pragma once

#include "gradients.h"
#include "tiles.h"

namespace FASTVAE_ISA {

// R rows of z, transposed: [D, R], each dimension at its position.
template <class T, int R>
void transpose_rows(const T* z, int64_t D, const int32_t* position, T* out) {
  for (int64_t d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r) out[position[d] * R + r] = z[r * D + d];
}

// rows[r][d] += sign * the sum of the lanes of dz[position of d][r], which becomes zero.
template <class T, int R>
void add_rows(T* dz, int64_t D, const int32_t* position, T sign, T* rows) {
  constexpr int W = kWidth<T>;
  for (int64_t d = 0; d < D; d += W) {
    T* sum[W];
    for (int i = 0; i < W; ++i) sum[i] = dz + position[min(d + i, D - 1)] * R * W;
    for (int r = 0; r < R; ++r) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        v[i] = load<T>(sum[i] + r * W);
        store<T>(sum[i] + r * W, Vec<T>{});
      }
      T* row = rows + r * D + d;
      store_up_to(row, load_up_to(row, D - d) + sign * sums<T>(v), D - d);
    }
  }
}

// f of each tile of R rows, and of what is left by tiles of half as many.
template <int R, class F>
void for_row_tiles(int64_t row, int64_t rows, const F& f) {
  for (; row + R <= rows; row += R) f.template operator()<R>(row);
  if constexpr (R > 1) for_row_tiles<R / 2>(row, rows, f);
}

// The same for all rows of a range.  Where components are in order, more of the smaller tiles are left out.
template <class T, class F>
void for_row_tiles(const Mixture<T>& mixture, int64_t rows, const F& f) {
  mixture.order ? for_row_tiles<kStrip>(0, rows, f) : for_row_tiles<kRows>(0, rows, f);
}

template <class T>
int64_t mixture_scratch(int64_t D, bool shared) {
  return Scratch<T>::bytes(D, shared);
}

}  // namespace FASTVAE_ISA
