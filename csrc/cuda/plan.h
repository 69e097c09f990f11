// How a problem is cut into tiles, and where in scratch memory what is packed lies.  Host arithmetic alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "device_math.h"
#include "kernels.h"

namespace fastvae::cuda {

constexpr int kThreads = 256;  // of a block: 16 x 16, each with kOwn rows x kOwn components of a tile

template <class T>
struct Tile {
  static constexpr int kVector = 16 / int(sizeof(T));  // numbers in the widest load
  static constexpr int kOwn = 2 * kVector;             // 8, or 4 in double precision
  static constexpr int kSide = 16 * kOwn;              // rows of a tile, and components: 128, or 64
};

constexpr int kChunk = 64;  // dimensions whose gradients a block holds in registers

// Dimensions whose t^2 are added up one by one; the sums of such blocks are then added up.  So the error of a sum of
// equal terms grows with kBlock + D / kBlock and not with D.
constexpr int kBlock = 64;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Blocks that a device runs at a time are taken to be those of an H200, so that how sums are cut, and with it the last
// bit of a result, does not depend on the device.
constexpr int64_t kMultiprocessors = 132;

// Problems that take one launch and no tiles.  With so few rows the tiled kernels' blocks, one for 128 rows or
// components, would leave most multiprocessors without work, and a launch costs more than the work does.  The limits
// are those of the blocks' shared memory, and K D such that a block is through all parameters about as soon as the
// launches that it saves would be.  FASTVAE_TILES=1 takes tiles at any size: for the tests.
constexpr int kSmallRows = 4 * int(kMultiprocessors), kSmallComponents = 1024, kSmallDimensions = 512;
constexpr int64_t kSmallParameters = 1 << 16;

inline bool is_small(int64_t M, int64_t K, int64_t D) {
  const char* tiles = std::getenv("FASTVAE_TILES");
  return M <= kSmallRows && K <= kSmallComponents && D <= kSmallDimensions && K * D <= kSmallParameters &&
         !(tiles && tiles[0] == '1');
}

// How many rows, or components, a block of theirs owns: one where each can have a multiprocessor.
template <class T>
int small_share(int64_t n) {
  return n <= kMultiprocessors ? 1 : Tile<T>::kVector;
}

// In how many parts `tiles` are cut where `others` blocks, times the parts, run `at_a_time`: the fewest steps, then the
// fewest parts.  The parts of all blocks are kept until they are merged, hence the limit.
inline int plan_splits(int64_t tiles, int64_t others, int64_t at_a_time) {
  int best = 1;
  int64_t least = INT64_MAX;
  const int64_t most = std::min(tiles, std::max<int64_t>(1, 4 * at_a_time / std::max<int64_t>(1, others)));
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t steps = (others * splits + at_a_time - 1) / at_a_time * ((tiles + splits - 1) / splits);
    if (steps < least) least = steps, best = splits;
  }
  return best;
}

// Pieces of one scratch allocation, each on a boundary of 16 bytes, null where they are empty; with null memory it only
// counts.
template <class T>
class Carve {
 public:
  explicit Carve(T* memory) : memory_(memory) {}
  T* take(int64_t n) {
    T* piece = memory_ && n > 0 ? memory_ + size_ : nullptr;
    size_ += round_up(n, Tile<T>::kVector);
    return piece;
  }
  int64_t size() const { return size_; }

 private:
  T* memory_;
  int64_t size_ = 0;
};

// Rows and components in the order in which the kernels read them, padded to whole tiles.  A row or component that is
// padding, or absent by a weight of -inf, is such that it reaches nothing.
template <class T>
struct Packed {
  int row_tiles, panels;  // a panel is the components of one tile
  int depth, width;       // D, rounded up to 2 and to 8
  T* rows;                    // [row_tiles, depth, kSide]: z
  T* pairs;                   // [panels, depth, 2, kSide]: s and -mu s, or s and mu where `difference` is set
  T* c;                       // [panels, kSide]: log of the component's greatest density, weight included; -inf where absent
  T* difference;              // [panels]: not 0 where t has to be computed as (z - mu) s
  // for backward
  T* extremes;    // [panels, 2]: the largest c, and the largest steepness
  T *z, *mu, *v;  // [row_tiles kSide, width], [panels kSide, width] twice; v = 1 / sigma^2

  Packed(const Mixture<T>& mix, Carve<T>& carve, bool backward) {
    constexpr int64_t side = Tile<T>::kSide;
    row_tiles = int((mix.M + side - 1) / side);
    panels = int((mix.K + side - 1) / side);
    depth = int(round_up(mix.D, 2));
    width = int(round_up(mix.D, 8));
    rows = carve.take(side * row_tiles * depth);
    pairs = carve.take(side * panels * depth * 2);
    c = carve.take(side * panels);
    difference = carve.take(panels);
    extremes = carve.take(backward ? panels * 2 : 0);
    z = carve.take(backward ? side * row_tiles * width : 0);
    mu = carve.take(backward ? side * panels * width : 0);
    v = carve.take(backward ? side * panels * width : 0);
  }
};

// Fills it.  log_prob [M] in backward, else null; widest [D], the largest logvar of any component, or null.
template <class T>
void pack(const Mixture<T>&, const T* log_prob, const T* widest, const Packed<T>&, Stream);

}  // namespace fastvae::cuda
