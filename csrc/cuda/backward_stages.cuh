// The stages of backward for large problems: what lies in shared memory, and the order in which it is copied there.
//
// A block goes over each tile twice (mixture_backward.cuh).  Both passes take what they read of the tile from stages in
// shared memory: first a few dimensions of all rows and components, then all dimensions of a few items of the other
// side.  These stages are one stream: while a block works on one of them the next ones are on their way, those of the
// next tile included, and there is one barrier a stage.
#pragma once

#include "tile.cuh"

namespace fastvae::cuda {

enum class Side { rows, components };

constexpr int kBackwardDepth = 8;   // dimensions of a stage of the first pass
constexpr int kBackwardStages = 5;  // of which four are on their way

template <Side kSide, class T>
struct BackwardTile {
  static constexpr bool kOwnsRows = kSide == Side::rows;
  static constexpr int kRows = Tile<T>::kSide, kComponents = Tile<T>::kSide / 2;
  static constexpr int kColumns = Tile<T>::kOwn / 2;  // components of a thread in the first pass
  static constexpr int kOwn = kOwnsRows ? kRows : kComponents, kOther = kOwnsRows ? kComponents : kRows;

  using SquaresStage = Stage<T, kBackwardDepth, kComponents>;
  // What the second pass reads of an item: mu and v of a component, or z of a row.
  static constexpr int kArrays = kOwnsRows ? 2 : 1;
  static constexpr int kItems = int(sizeof(SquaresStage) / (kArrays * kChunk * sizeof(T)));  // of a stage
  static constexpr int kPieces = kOther / kItems;                                            // of a tile
  union Stages {
    SquaresStage squares;
    T items[kArrays][kItems][kChunk];
  };
};

// How many tiles the components are.  Where the last panel's second half is padding alone, it is none.
template <class T>
FASTVAE_INLINE int component_tiles(const Mixture<T>& mix) {
  constexpr int kComponents = BackwardTile<Side::rows, T>::kComponents;
  return int((mix.K + kComponents - 1) / kComponents);
}

template <Side kSide, class T>
struct BackwardShared {
  using Shape = BackwardTile<kSide, T>;
  static constexpr int kLine = Shape::kOwn + Tile<T>::kVector;  // no two lines begin in the same bank
  typename Shape::Stages stages[kBackwardStages];
  // [item of the other side][own item].  While a tile's squares are added up, the sums of earlier blocks of dimensions.
  alignas(16) T weights[Shape::kOther][kLine];
  // What turns a tile's squares into weights: c of each component; of each row l, g, the limit, and which of the tile's
  // components it excludes, or -1.
  T c[Shape::kComponents], log_prob[Shape::kRows], grad[Shape::kRows], limit[Shape::kRows];
  int excluded[Shape::kRows];
  T w_sum[kThreads];     // on the components' side: the sums of the weights that a thread adds up, over all tiles
  bool difference_form;  // of its squares

  __device__ __forceinline__ EarlierInSharedMemory<T, Shape::kColumns> earlier() {
    return {weights[0] + thread_index()};
  }
};

// Two blocks run at a time on a multiprocessor of sm_80, which has 164 KiB.  A block takes 1 KiB beside its own.
template <class Shared>
constexpr bool kTwoFit = 2 * (sizeof(Shared) + 1024) <= 164 * 1024;
static_assert(kTwoFit<BackwardShared<Side::rows, float>> && kTwoFit<BackwardShared<Side::components, float>>);
static_assert(kTwoFit<BackwardShared<Side::rows, double>> && kTwoFit<BackwardShared<Side::components, double>>);

// Begins to copy lines (kMaxLines at most) of pieces of 16 bytes (kPieces at most), from the piece `from` of an array
// on.  Pieces are counted in 32 bits, which is cheaper and enough for arrays of 64 GB.
template <int kMaxLines, int kPieces, class T>
__device__ __forceinline__ void copy_lines(T* to, const T* array, unsigned from, unsigned stride, unsigned lines,
                                           unsigned pieces) {
  constexpr unsigned at_once = kThreads / kPieces;
  static_assert(kMaxLines % at_once == 0, "every thread copies as much");
  const unsigned thread = thread_index(), line = thread / kPieces, piece = thread % kPieces;
  const auto* source = reinterpret_cast<const Vector<T>*>(array);
#pragma unroll
  for (unsigned begin = 0; begin < kMaxLines; begin += at_once) {
    if (begin + line >= lines || piece >= pieces) continue;
    Vector<T>* target = reinterpret_cast<Vector<T>*>(to) + begin * kPieces + thread;
    __pipeline_memcpy_async(target, source + (from + (begin + line) * stride + piece), 16);
  }
}

// The stream of the stages of the tiles from `begin` to `end` of the other side.
template <Side kSide, class T>
class BackwardStream {
  using Shape = BackwardTile<kSide, T>;
  using Stages = typename Shape::Stages;
  static constexpr int n = Tile<T>::kVector;

 public:
  __device__ __forceinline__ BackwardStream(Stages* stages, const Packed<T>& packed, int own_tile, int begin, int end,
                                            int first_dimension)
      : stages_(stages), packed_(packed), own_(own_tile), tile_(begin), end_(end), first_dimension_(first_dimension) {
#pragma unroll 1
    for (int stage = 0; stage < kBackwardStages - 1; ++stage) copy_next(stages_[stage]);
  }

  // Between two tiles: the next one, `end` after the last.  As a tile has more stages than are on their way, the stage
  // that is copied next is of the same tile.
  __device__ __forceinline__ int tile() const { return tile_; }
  static_assert(1 + Shape::kPieces > kBackwardStages - 1);

  // The next stage, when it has arrived.  The one before it may not be read any more.
  __device__ __forceinline__ const Stages& next() {
    __pipeline_wait_prior(kBackwardStages - 2);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the stage before this one any more
    copy_next(stages_[reading_]);
    reading_ = reading_ + 1 < kBackwardStages ? reading_ + 1 : 0;
    return stages_[reading_];
  }

 private:
  __device__ __forceinline__ void copy_next(Stages& to) {
    if (tile_ < end_) {
      const int squares = (packed_.depth + kBackwardDepth - 1) / kBackwardDepth;
      if (stage_ < squares)
        copy_squares(to.squares, stage_ * kBackwardDepth);
      else
        copy_items(to.items, stage_ - squares);
      if (++stage_ == squares + Shape::kPieces) stage_ = 0, ++tile_;
    }
    __pipeline_commit();  // also where there was nothing to copy: next() counts
  }

  __device__ __forceinline__ void copy_squares(typename Shape::SquaresStage& to, int d) {
    constexpr int kRowPieces = Shape::kRows / n, kPieces = Shape::kComponents / n;
    const unsigned lines = 2 * (packed_.depth - d < kBackwardDepth ? packed_.depth - d : kBackwardDepth);
    const unsigned row_tile = Shape::kOwnsRows ? own_ : tile_, components = Shape::kOwnsRows ? tile_ : own_;
    const unsigned row_line = row_tile * packed_.depth + d, component_line = 2 * (components / 2 * packed_.depth + d);
    const auto copy = [&](T* to, const T* array, unsigned from, unsigned stride) {  // lines of half a tile
      copy_lines<2 * kBackwardDepth, kPieces>(to, array, from, stride, lines, kPieces);
    };
    copy(to.rows[0], packed_.rows, row_line * kRowPieces, kPieces);
    // a tile has half of a panel's components
    copy(to.components[0][0], packed_.components, component_line * kRowPieces + components % 2 * kPieces, kRowPieces);
  }

  __device__ __forceinline__ void copy_items(T (&to)[Shape::kArrays][Shape::kItems][kChunk], int piece) {
    const unsigned stride = unsigned(packed_.width) / n, first = unsigned(first_dimension_) / n;
    const unsigned from = unsigned(tile_ * Shape::kOther + piece * Shape::kItems) * stride + first;
    const auto copy = [&](T(&to)[Shape::kItems][kChunk], const T* array) {
      copy_lines<Shape::kItems, kChunk / n>(to[0], array, from, stride, Shape::kItems, stride - first);
    };
    if constexpr (Shape::kOwnsRows) {
      copy(to[0], packed_.mu);
      copy(to[1], packed_.v);
    } else {
      copy(to[0], packed_.z);
    }
  }

  Stages* stages_;
  const Packed<T>& packed_;
  const int own_;
  int tile_, end_, first_dimension_;
  int stage_ = 0;  // of the tile: the one that is copied next
  int reading_ = kBackwardStages - 1;
};

}  // namespace fastvae::cuda
