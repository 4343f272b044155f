#include "head.h"

#include <algorithm>

#include "vector.h"

namespace r1kern {
namespace {

// Partial sums of this many terms are rounded in Real, their total is kept in double.
constexpr std::int64_t kBlock = 2048;
// Columns that one thread carries over all rows: short enough that a row's piece stays in cache
// while it is read and written.
constexpr std::int64_t kColumns = 4096;

template <typename Real>
R1KERN_INLINE Real row_max(const Real* z, std::int64_t V) {
  Real top = z[0];
#pragma omp simd reduction(max : top)
  for (std::int64_t j = 0; j < V; ++j) top = z[j] > top ? z[j] : top;
  return top;
}

template <typename Real>
R1KERN_INLINE void row_sums(const Real* z, std::int64_t V, Real top, double* total,
                            double* moment) {
  *total = *moment = 0;
  for (std::int64_t start = 0; start < V; start += kBlock) {
    const std::int64_t end = std::min(start + kBlock, V);
    Real sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
    for (std::int64_t j = start; j < end; ++j) {
      const Real x = z[j] - top;
      const Real e = fast_exp(x);
      sum += e;
      weighted += e * x;
    }
    *total += sum;
    *moment += weighted;
  }
}

template <typename Real>
R1KERN_INLINE void piece(const Real* z, Real* dz, std::int64_t n, Real shift, Real c0, Real c1) {
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) {
    const Real x = z[j] - shift;
    dz[j] = fast_exp(x) * (c0 + c1 * x);
  }
}

R1KERN_CLONES void stats_of(const float* z, std::int64_t V, float* top, double* total,
                            double* moment) {
  *top = row_max(z, V);
  row_sums(z, V, *top, total, moment);
}

void stats_of(const double* z, std::int64_t V, double* top, double* total, double* moment) {
  *top = row_max(z, V);
  row_sums(z, V, *top, total, moment);
}

R1KERN_CLONES void dlogits_of(const float* z, float* dz, std::int64_t n, float shift, float c0,
                              float c1) {
  piece(z, dz, n, shift, c0, c1);
}

void dlogits_of(const double* z, double* dz, std::int64_t n, double shift, double c0, double c1) {
  piece(z, dz, n, shift, c0, c1);
}

}  // namespace

template <typename Real>
void logits_stats(const Real* z, std::int64_t n, std::int64_t V, const std::int64_t* columns,
                  Real* stats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < n; ++i) {
    const Real* row = z + i * V;
    double total, moment;
    stats_of(row, V, stats + i, &total, &moment);
    stats[n + i] = static_cast<Real>(total);
    stats[2 * n + i] = static_cast<Real>(moment);
    stats[3 * n + i] = columns[i] < 0 ? Real(0) : row[columns[i]];
  }
}

template <typename Real>
void dlogits(Real* z, std::int64_t V, const std::int64_t* live, std::int64_t m,
             const std::int64_t* columns, const Real* shift, const Real* c0, const Real* c1,
             const Real* g, int threads) {
  // A thread owns columns and walks over the rows upwards: a row is read before it is written over.
  const std::int64_t pieces = (V + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t p = 0; p < pieces; ++p) {
    const std::int64_t start = p * kColumns, width = std::min(kColumns, V - start);
    for (std::int64_t i = 0; i < m; ++i) {
      const std::int64_t r = live ? live[i] : i;
      Real* dz = z + i * V + start;
      dlogits_of(z + r * V + start, dz, width, shift[r], c0[r], c1[r]);
      const std::int64_t target = columns[r] - start;
      if (columns[r] >= 0 && target >= 0 && target < width) dz[target] += g[r];
    }
  }
}

template void logits_stats(const float*, std::int64_t, std::int64_t, const std::int64_t*, float*,
                           int);
template void logits_stats(const double*, std::int64_t, std::int64_t, const std::int64_t*, double*,
                           int);
template void dlogits(float*, std::int64_t, const std::int64_t*, std::int64_t, const std::int64_t*,
                      const float*, const float*, const float*, const float*, int);
template void dlogits(double*, std::int64_t, const std::int64_t*, std::int64_t,
                      const std::int64_t*, const double*, const double*, const double*,
                      const double*, int);

}  // namespace r1kern
