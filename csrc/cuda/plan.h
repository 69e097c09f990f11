// How a problem is cut into tiles and splits, which problems are small, and how scratch memory is laid out.  This is
// arithmetic of the host alone.
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
  static constexpr int kVector = 16 / int(sizeof(T));  // numbers in the max_logvar load
  static constexpr int kOwn = 2 * kVector;             // 8, or 4 in double precision
  static constexpr int kSide = 16 * kOwn;              // rows of a tile, and components: 128, or 64
};

constexpr int kChunk = 64;  // dimensions whose gradients a block holds in registers at a time

// The t^2 of a block of kBlock dimensions are added up one by one, and then the sums of the blocks.  So the error of a
// sum of equal terms grows with kBlock + D / kBlock and not with D.
constexpr int kBlock = 64;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The number of multiprocessors is taken to be that of an H200, whatever the device.  So the splits of a sum, and with
// them the last bits of a result, do not depend on the device.
constexpr int64_t kMultiprocessors = 132;

// A small problem takes one launch and no tiles.  With so few rows or components, tiles of 128 would leave most
// multiprocessors without work, and a launch costs more than the work does.  The limits of M, K and D come from a
// block's shared memory.  The limit of K D is where going through all parameters takes a block about as long as the
// launches that it saves.  FASTVAE_TILES=1 takes tiles at any size: for the tests.
constexpr int kSmallRows = 4 * int(kMultiprocessors), kSmallComponents = 1024, kSmallDimensions = 512;
constexpr int64_t kSmallParameters = 1 << 16;

inline bool is_small(int64_t M, int64_t K, int64_t D) {
  const char* tiles = std::getenv("FASTVAE_TILES");
  return M <= kSmallRows && K <= kSmallComponents && D <= kSmallDimensions && K * D <= kSmallParameters &&
         !(tiles && tiles[0] == '1');
}

// Whether the product form is tried first, which says on the device where it is not as exact as the difference form.  That
// takes about 10 microseconds to find out: the rows are to pay for packing the components' features, and 2^28 multiply-adds
// take the difference form about 20 microseconds.  FASTVAE_CERTIFICATE=0 tries it never, and 1 always: for the tests.
template <class T>
bool is_certificate_tried(const Mixture<T>& mix) {
  if (sizeof(T) != 4) return false;
  if (const char* asked = std::getenv("FASTVAE_CERTIFICATE")) return asked[0] == '1';
  return mix.M >= 256 && double(mix.M) * double(mix.K) * double(mix.D) >= double(1 << 28);
}

template <class T>
bool has_parameters(const Gradients<T>& wanted) {
  return wanted.dmu || wanted.dlogvar || wanted.dweights;
}
template <class T>
bool has_any(const Gradients<T>& wanted) {
  return wanted.dz || has_parameters(wanted);
}

// Of the gradients that are wanted, those for which the product form is tried first.  With few others to sum, or few
// dimensions, the tests allow sums less than products may lose.
template <class T>
Gradients<T> certified_of(const Mixture<T>& mix, Gradients<T> wanted) {
  const bool tried = mix.D <= kMaxCertifiedDimensions && is_certificate_tried(mix),
             always = std::getenv("FASTVAE_CERTIFICATE");
  if (!tried || !(always || (mix.D > 24 && mix.K >= (mix.D > 48 ? 1024 : mix.D > 32 ? 4096 : 16384))))
    wanted.dz = nullptr;
  if (!tried || !(always || mix.M >= (mix.D > 48 ? 1024 : 4096)))
    wanted.dmu = wanted.dlogvar = wanted.dweights = nullptr;
  return wanted;
}

// How many of the n rows, or components, a block of a small problem owns: one where each can have a multiprocessor.
template <class T>
int small_own(int64_t n) {
  return n <= kMultiprocessors ? 1 : Tile<T>::kVector;
}

// In how many splits `tiles` are cut, where `blocks` blocks go through each split and `at_a_time` blocks run at a time:
// such that the steps are fewest, and of several such numbers the smallest.  There is a limit because the results of
// all splits are kept until they are merged.
inline int plan_splits(int64_t tiles, int64_t blocks, int64_t at_a_time) {
  int best = 1;
  int64_t min_steps = INT64_MAX;
  const int64_t max_splits = std::min(tiles, std::max<int64_t>(1, 4 * at_a_time / std::max<int64_t>(1, blocks)));
  for (int splits = 1; splits <= max_splits; ++splits) {
    const int64_t steps = (blocks * splits + at_a_time - 1) / at_a_time * ((tiles + splits - 1) / splits);
    if (steps < min_steps) min_steps = steps, best = splits;
  }
  return best;
}

// Lays out one allocation of scratch memory in pieces, each on a boundary of 16 bytes; an empty piece is null.  Without
// memory it only counts, and all pieces are null.
template <class T>
class Scratch {
 public:
  explicit Scratch(T* memory) : memory_(memory) {}
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

// Rows and components in the order in which the kernels read them, padded to whole tiles.  A component of weight -inf
// is absent.  Absent components, and the rows and components of the padding, have such numbers that they change no
// result.
template <class T>
struct Packed {
  int row_tiles, panels;  // a panel is the components of one tile
  int depth, width;       // D, rounded up to a multiple of 2 and of 8
  T* rows;                // [row_tiles, depth, kSide]: z
  T* components;          // [panels, depth, 2, kSide]: s and -mu s; in the difference form s and mu
  T* c;                   // [panels, kSide]: the exponent at the component's mean; -inf where absent
  T* difference_form;     // [panels]: not 0 where t is computed as (z - mu) s, else it is z s - mu s
  // For backward, else null.
  T* panel_max;            // [panels, 2]: the largest c, and the largest log sigma ratio, of a panel's components
  T *z, *mu, *v;           // [row_tiles kSide, width], [panels kSide, width] twice; v = 1 / sigma^2
  int* only_if = nullptr;  // on the device: where it is 0, nothing is to be computed

  Packed(const Mixture<T>& mix, Scratch<T>& scratch, bool backward) {
    constexpr int64_t side = Tile<T>::kSide;
    row_tiles = int((mix.M + side - 1) / side);
    panels = int((mix.K + side - 1) / side);
    depth = int(round_up(mix.D, 2));
    width = int(round_up(mix.D, 8));
    rows = scratch.take(side * row_tiles * depth);
    components = scratch.take(side * panels * depth * 2);
    c = scratch.take(side * panels);
    difference_form = scratch.take(panels);
    panel_max = scratch.take(backward ? panels * 2 : 0);
    z = scratch.take(backward ? side * row_tiles * width : 0);
    mu = scratch.take(backward ? side * panels * width : 0);
    v = scratch.take(backward ? side * panels * width : 0);
  }
};

// Fills `packed`.  log_prob [M] in backward, else null.  max_logvar [D] is the largest logvar of any component; null
// where no log sigma ratios are needed, which are then 0.
template <class T>
void pack(const Mixture<T>&, const T* log_prob, const T* max_logvar, const Packed<T>& packed, Stream);

}  // namespace fastvae::cuda
