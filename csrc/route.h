#pragma once

#include <cstdint>

// DeepSeek-V3's router with everything the permutation needs (arXiv 2412.19437, equations 12-16).

namespace r1kern {

struct RouteShape {
  std::int64_t T, E, groups, topk_groups, K;
  std::int64_t R;      // rows of the permuted layout
  std::int64_t align;  // each expert's rows are padded to a multiple of it
  double scale;
  bool normalize;
};

template <typename Real>
struct RouteOut {
  Real* weights;          // [T, K]
  std::int64_t* indices;  // [T, K]
  std::int64_t* counts;   // [E]
  std::int64_t* offsets;  // [E + 1]
  std::int32_t* slots;    // [T, K]
  std::int32_t* order;    // [R], -1 on padding rows
  Real* score_sums;       // [E]
};

// logits [T, E], bias [E].  Of equal candidates the lowest index wins; NaN counts as the greatest.
// The result does not depend on the number of threads.
template <typename Real>
void route(const Real* logits, const Real* bias, const RouteShape& shape,
           const RouteOut<Real>& out, int threads);

}  // namespace r1kern
