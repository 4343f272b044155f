#include "permute.h"

#include <cstring>

#include "pages.h"
#include "vector.h"

namespace r1kern {
namespace {

R1KERN_CLONES void scale_into(const float* x, float w, std::int64_t n, float* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = w * x[i];
}

R1KERN_CLONES void add_scaled(const float* x, float w, std::int64_t n, float* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += w * x[i];
}

void scale_into(const double* x, double w, std::int64_t n, double* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = w * x[i];
}

void add_scaled(const double* x, double w, std::int64_t n, double* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += w * x[i];
}

R1KERN_CLONES double dot(const float* x, const float* y, std::int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

double dot(const double* x, const double* y, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace

void permute(const char* x, const std::int32_t* order, std::int64_t R, std::int64_t K,
             std::int64_t bytes, char* rows, int threads) {
  prefer_huge_pages(rows, R * bytes);
  // In the order of the rows: fresh memory is cheapest when it is written from end to end.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < R; ++r) {
    if (order[r] < 0) {
      std::memset(rows + r * bytes, 0, bytes);
    } else {
      std::memcpy(rows + r * bytes, x + order[r] / K * bytes, bytes);
    }
  }
}

template <typename Real>
void unpermute(const Real* rows, const std::int32_t* slots, const Real* weights, std::int64_t T,
               std::int64_t K, std::int64_t H, Real* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t k = 0; k < K; ++k) {
      const Real* row = rows + slots[t * K + k] * H;
      const Real w = weights ? weights[t * K + k] : 1;
      if (k == 0) {
        scale_into(row, w, H, y + t * H);
      } else {
        add_scaled(row, w, H, y + t * H);
      }
    }
  }
}

template <typename Real>
void unpermute_backward(const Real* grad, const Real* rows, const std::int32_t* slots,
                        const Real* weights, std::int64_t T, std::int64_t K, std::int64_t H,
                        Real* grad_rows, Real* grad_weights, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t k = 0; k < K; ++k) {
      const std::int64_t at = slots[t * K + k] * H;
      grad_weights[t * K + k] = static_cast<Real>(dot(grad + t * H, rows + at, H));
      scale_into(grad + t * H, weights[t * K + k], H, grad_rows + at);
    }
  }
}

template void unpermute(const float*, const std::int32_t*, const float*, std::int64_t,
                        std::int64_t, std::int64_t, float*, int);
template void unpermute(const double*, const std::int32_t*, const double*, std::int64_t,
                        std::int64_t, std::int64_t, double*, int);
template void unpermute_backward(const float*, const float*, const std::int32_t*, const float*,
                                 std::int64_t, std::int64_t, std::int64_t, float*, float*, int);
template void unpermute_backward(const double*, const double*, const std::int32_t*, const double*,
                                 std::int64_t, std::int64_t, std::int64_t, double*, double*, int);

}  // namespace r1kern
