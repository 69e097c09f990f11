// How the pairs of rows and components are cut into tasks.
//
// A task is a range of rows by a range of components.  Where a cut changes the order of a sum, it depends on the shapes
// alone: the same input gives the same bits, whatever the number of threads.
#pragma once

#include "prepared.h"

namespace fastvae {

constexpr int64_t kTileRows = 8, kPanel = kMaxPanel;  // of the widest instruction set

constexpr int64_t kMergeBytes = 32 << 20;  // what splits may hold before they are merged

// Splits of the components at most.  They are few in forward, because in each a row has to find its largest terms anew
// before it can leave others out.
constexpr int64_t kForwardSplits = 8, kBackwardSplits = 64;

constexpr int64_t kManyRows = 1024;

struct Plan {
  int64_t slab;    // rows that are worked on at a time
  int64_t groups;  // into which a slab's rows are cut
  int64_t splits;  // into which the components are cut
};

// Components are split first, because each is packed once then; rows are split too where there are few components.
// With kManyRows or more rows for each task, packing costs little.  There rows are split first if rows_first allows it:
// a row then has less to merge.  row_bytes is what a split holds for each row until it is merged.
inline Plan plan(int64_t M, int64_t K, int64_t D, int64_t row_bytes, int64_t max_splits, bool rows_first) {
  const int64_t pairs = std::max<int64_t>(1, M) * K;
  const int64_t elements = pairs > (int64_t(1) << 60) / D ? int64_t(1) << 60 : pairs * D;
  // 2^19 elements take some tens of microseconds, 2^25 some milliseconds.  By fours, for an even load on 2 or 4
  // threads.
  int64_t tasks = std::clamp<int64_t>(elements >> 25, std::clamp<int64_t>(elements >> 19, 1, 16), 64);
  if (tasks > 1) tasks = (tasks + 3) / 4 * 4;
  Plan p;
  p.splits = std::clamp<int64_t>(K / kPanel, 1, std::min(tasks, max_splits));
  if (rows_first) p.splits = (p.splits - 1) / std::max<int64_t>(1, M / kManyRows) + 1;
  p.slab = std::max<int64_t>(256, kMergeBytes / (p.splits * row_bytes) / kTileRows * kTileRows);
  p.groups = std::clamp<int64_t>(std::min(M, p.slab) / 64, 1, tasks / p.splits);
  return p;
}

// The beginning of part i of n, cut by whole blocks: rows of a tile, components of a panel.
inline int64_t cut_blocks(int64_t n, int64_t block, int64_t parts, int64_t i) {
  return std::min(n, block * cut((n + block - 1) / block, parts, i));
}

inline Range range_of(const Plan& p, int64_t row_begin, int64_t row_end, int64_t K, int64_t task) {
  const int64_t rows = row_end - row_begin, group = task / p.splits, split = task % p.splits;
  const auto row = [&](int64_t i) { return row_begin + cut_blocks(rows, kTileRows, p.groups, i); };
  const auto component = [&](int64_t i) { return cut_blocks(K, kPanel, p.splits, i); };
  return {row(group), row(group + 1), component(split), component(split + 1)};
}

}  // namespace fastvae
