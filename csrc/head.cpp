#include "head.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace r1kern {
namespace {

// Vocabulary entries that stay in cache between the two passes over them.
constexpr std::int64_t kBlock = 128;
// Terms that are summed in Real; their sums are added in double.
constexpr std::int64_t kRun = 32;

// Statistics of each of n rows about a maximum of their own.
template <typename Real>
struct Sums {
  explicit Sums(std::int64_t n) : top(n), total(n), moment(n) {}

  std::vector<Real> top;
  std::vector<double> total, moment;
};

template <typename Real>
R1KERN_INLINE void add_run(const Real* z, std::int64_t n, std::int64_t stride, std::int64_t count,
                           const Real* top, Real* sum, Real* weighted) {
  std::fill(sum, sum + n, Real(0));
  std::fill(weighted, weighted + n, Real(0));
  for (std::int64_t v = 0; v < count; ++v) {
    const Real* row = z + v * stride;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const Real x = row[i] - top[i];
      const Real e = fast_exp(x);
      sum[i] += e;
      weighted[i] += e * x;
    }
  }
}

template <typename Real>
R1KERN_INLINE void block_stats(const Real* z, std::int64_t n, std::int64_t stride,
                               std::int64_t count, Sums<Real>& out) {
  std::copy(z, z + n, out.top.begin());
  Real* top = out.top.data();
  for (std::int64_t v = 1; v < count; ++v) {
    const Real* row = z + v * stride;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) top[i] = row[i] > top[i] ? row[i] : top[i];
  }
  std::fill(out.total.begin(), out.total.end(), 0.0);
  std::fill(out.moment.begin(), out.moment.end(), 0.0);
  std::vector<Real> run(2 * n);
  for (std::int64_t v = 0; v < count; v += kRun) {
    add_run(z + v * stride, n, stride, std::min(kRun, count - v), top, run.data(), run.data() + n);
    for (std::int64_t i = 0; i < n; ++i) {
      out.total[i] += run[i];
      out.moment[i] += run[n + i];
    }
  }
}

template <typename Real>
R1KERN_INLINE void gradient_row(const Real* z, Real* dz, std::int64_t m, const std::int64_t* from,
                                const Real* shift, const Real* c0, const Real* c1) {
  if (from) {
    // Reads are at or above the place that is written: in place from the first on.
#pragma omp simd
    for (std::int64_t i = 0; i < m; ++i) {
      const Real x = z[from[i]] - shift[i];
      dz[i] = fast_exp(x) * (c0[i] + c1[i] * x);
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < m; ++i) {
      const Real x = z[i] - shift[i];
      dz[i] = fast_exp(x) * (c0[i] + c1[i] * x);
    }
  }
}

R1KERN_CLONES void stats_of(const float* z, std::int64_t n, std::int64_t stride,
                            std::int64_t count, Sums<float>& out) {
  block_stats(z, n, stride, count, out);
}

void stats_of(const double* z, std::int64_t n, std::int64_t stride, std::int64_t count,
              Sums<double>& out) {
  block_stats(z, n, stride, count, out);
}

R1KERN_CLONES void gradient_of(float* z, std::int64_t m, const std::int64_t* from,
                               const float* shift, const float* c0, const float* c1) {
  gradient_row(z, z, m, from, shift, c0, c1);
}

void gradient_of(double* z, std::int64_t m, const std::int64_t* from, const double* shift,
                 const double* c0, const double* c1) {
  gradient_row(z, z, m, from, shift, c0, c1);
}

// Statistics of row i over all blocks, moved to the greatest of their maxima.
template <typename Real>
void combine(const std::vector<Sums<Real>>& blocks, std::int64_t i, Real* top, Real* total,
             Real* moment) {
  *top = blocks[0].top[i];
  for (const Sums<Real>& block : blocks) *top = std::max(*top, block.top[i]);
  double sum = 0, weighted = 0;
  for (const Sums<Real>& block : blocks) {
    const double x = static_cast<double>(block.top[i]) - *top, scale = std::exp(x);
    sum += scale * block.total[i];
    weighted += scale * (block.moment[i] + x * block.total[i]);
  }
  *total = static_cast<Real>(sum);
  *moment = static_cast<Real>(weighted);
}

template <typename Real>
std::vector<Real> picked(const Real* values, const std::int64_t* live, std::int64_t m) {
  std::vector<Real> out(m);
  for (std::int64_t i = 0; i < m; ++i) out[i] = values[live ? live[i] : i];
  return out;
}

}  // namespace

template <typename Real>
void logits_stats(const Real* z, std::int64_t n, std::int64_t V, std::int64_t stride,
                  const std::int64_t* columns, Real* stats, int threads) {
  const std::int64_t blocks = (V + kBlock - 1) / kBlock;
  std::vector<Sums<Real>> parts(blocks, Sums<Real>(n));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t start = b * kBlock;
    stats_of(z + start * stride, n, stride, std::min(kBlock, V - start), parts[b]);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < n; ++i) {
    combine(parts, i, stats + i, stats + n + i, stats + 2 * n + i);
    stats[3 * n + i] = columns[i] < 0 ? Real(0) : z[columns[i] * stride + i];
  }
}

template <typename Real>
void dlogits(Real* z, std::int64_t V, std::int64_t stride, const std::int64_t* live,
             std::int64_t m, const std::int64_t* columns, const Real* shift, const Real* c0,
             const Real* c1, const Real* g, int threads) {
  const auto s = picked(shift, live, m), a = picked(c0, live, m), b = picked(c1, live, m);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t v = 0; v < V; ++v) {
    gradient_of(z + v * stride, m, live, s.data(), a.data(), b.data());
  }
  for (std::int64_t i = 0; i < m; ++i) {
    const std::int64_t r = live ? live[i] : i;
    if (columns[r] >= 0) z[columns[r] * stride + i] += g[r];
  }
}

template void logits_stats(const float*, std::int64_t, std::int64_t, std::int64_t,
                           const std::int64_t*, float*, int);
template void logits_stats(const double*, std::int64_t, std::int64_t, std::int64_t,
                           const std::int64_t*, double*, int);
template void dlogits(float*, std::int64_t, std::int64_t, const std::int64_t*, std::int64_t,
                      const std::int64_t*, const float*, const float*, const float*, const float*,
                      int);
template void dlogits(double*, std::int64_t, std::int64_t, const std::int64_t*, std::int64_t,
                      const std::int64_t*, const double*, const double*, const double*,
                      const double*, int);

}  // namespace r1kern
