#pragma once

#include <cstdint>

// Rows of tokens to and from the layout sorted by expert.  Shapes: T tokens of H elements, K choices
// each, R rows; slots [T, K] is the row of each choice, order [R] the choice t K + k of each row.

namespace r1kern {

// rows[r] = x[order[r] / K], or 0 where order[r] is negative; each row has `bytes` bytes.
void permute(const char* x, const std::int32_t* order, std::int64_t R, std::int64_t K,
             std::int64_t bytes, char* rows, int threads);

// y[t] = sum_k weights[t, k] rows[slots[t, k]]; weights may be null (all 1).
template <typename Real>
void unpermute(const Real* rows, const std::int32_t* slots, const Real* weights, std::int64_t T,
               std::int64_t K, std::int64_t H, Real* y, int threads);

// grad_rows[slots[t, k]] = weights[t, k] grad[t]; grad_weights[t, k] = <grad[t], rows[slots[t, k]]>.
template <typename Real>
void unpermute_backward(const Real* grad, const Real* rows, const std::int32_t* slots,
                        const Real* weights, std::int64_t T, std::int64_t K, std::int64_t H,
                        Real* grad_rows, Real* grad_weights, int threads);

}  // namespace r1kern
