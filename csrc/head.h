#pragma once

#include <cstdint>

// What the language-model head does with a chunk of logits between its matrix products.
//
// The chunk lies column by column, z [V, n] with `stride` elements from one vocabulary entry to the
// next: the matrix products are faster so, and all arithmetic runs along the n rows of the chunk.
// All functions are deterministic, whatever the number of threads.

namespace r1kern {

// Of each row: max z, sum exp(z - max), sum exp(z - max)(z - max), and z at columns[row] (0 where
// that is negative).  z [V, n] -> stats [4, n].
template <typename Real>
void logits_stats(const Real* z, std::int64_t n, std::int64_t V, std::int64_t stride,
                  const std::int64_t* columns, Real* stats, int threads);

// In place: row i < m is made from row r = live[i], live ascending (or r = i where live is null):
//   dz_j = exp(z_j - shift_r) (c0_r + c1_r (z_j - shift_r)) + g_r [j = columns_r].
template <typename Real>
void dlogits(Real* z, std::int64_t V, std::int64_t stride, const std::int64_t* live,
             std::int64_t m, const std::int64_t* columns, const Real* shift, const Real* c0,
             const Real* c1, const Real* g, int threads);

}  // namespace r1kern
