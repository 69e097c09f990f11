// Sums of many terms, for the CPU and CUDA alike.
#pragma once

#include "inline.h"

namespace fastvae {

// sum + compensation is the sum of what was added, as exact as with twice the digits.  V is a number or a vector.
//
// D equal terms, added up plainly, are not off by sqrt(D) roundings but by D / 4: as long as the sum stays between two
// powers of 2, every addition rounds by the same amount in the same direction.  Here the rounding error of each
// addition is found (Knuth's two-sum) and added up beside the sum.
template <class V>
struct CompensatedSum {
  V sum = {}, compensation = {};

  FASTVAE_INLINE void add(V x) {
    const V before = sum;
    sum = before + x;
    const V added = sum - before;
    compensation += (before - (sum - added)) + (x - added);
  }
};

// The sum of one number in double precision.  Where the sum is infinite, the compensation is NaN and does not count.
FASTVAE_INLINE double total_of(double sum, double compensation) {
  return compensation == compensation ? sum + compensation : sum;
}

}  // namespace fastvae
