// The memory that one task needs beside its input and output, and the sizes of what it works on.
#pragma once

#include "simd.h"

namespace FASTVAE_ISA {

// Components of a panel: two vectors.
template <class T>
constexpr int kPanel = 2 * kWidth<T>;

// Rows of a tile; and of a strip of it, whose sums stay in registers: 8 x 2 vectors of 32, or 4 x 2 of 16.
constexpr int kRows = 8;
constexpr int kStrip = kRegisters == 32 ? 8 : 4;

constexpr int kBatch = 8;  // panels that a tile's rows work on together

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// All arrays lie in one piece of memory.  A chunk of panels, and in backward its gradients, takes half a MiB: what
// stays in the L2 cache of today's cores.
template <class T>
struct Scratch {
  int64_t chunk;       // panels of a chunk at most
  T* mu;               // [chunk, D, kPanel]
  T* v;                // [chunk, D, kPanel], halved; shared: [1, D, kPanel]
  T* c;                // [chunk, kPanel]
  T* log_sigma_ratio;  // [chunk]: the largest of a panel's components, see ../common/skipping.h
  T* grads;            // [chunk, D, 2, kPanel]: sum_m w u, and sum_m w u^2; backward only
  T* weights;          // [chunk, kPanel]: sum_m w
  T* dz;               // [D, rows, kWidth]: sum_k w u v / 2, partial sums by lane; zero between tiles of rows
  T* z;                // [D, kRows]
  T* tiles;            // [kBatch, kRows, kPanel]

  // Where panel i begins in mu, and in v.
  int64_t at(int64_t i) const { return i * panel; }
  int64_t v_at(int64_t i) const { return shared ? 0 : i * panel; }

  void clear_dz(int64_t D) const { __builtin_memset(dz, 0, size_t(D) * kRows * kBytes); }

  static int64_t bytes(int64_t D, bool shared) {
    const Scratch forward(nullptr, D, shared, false), backward(nullptr, D, shared, true);
    return int64_t(sizeof(T)) * max(forward.size, backward.size) + kBytes;
  }

  Scratch(void* memory, int64_t D, bool shared, bool gradients) : panel(kPanel<T> * D), shared(shared) {
    base = reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory), kBytes));
    chunk = max(1, min(64, (512 << 10) / ((gradients ? 4 : 2) * panel * int64_t(sizeof(T)))));
    mu = take(chunk * panel);
    v = take(shared ? panel : chunk * panel);
    c = take(chunk * kPanel<T>);
    log_sigma_ratio = take(chunk);
    grads = take(gradients ? 2 * chunk * panel : 0);
    weights = take(chunk * kPanel<T>);
    dz = take(D * kRows * kWidth<T>);
    z = take(D * kRows);
    tiles = take(kBatch * kRows * kPanel<T>);
  }

 private:
  int64_t panel;  // numbers in one array of a panel
  bool shared;
  T* base;
  int64_t size = 0;
  T* take(int64_t n) {
    T* p = base + size;
    size += round_up(n, kWidth<T>);
    return p;
  }
};

}  // namespace FASTVAE_ISA
