#include "route.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace r1kern {
namespace {

// Tokens whose scores are summed apart; the blocks' sums are then added in order.
constexpr std::int64_t kBlock = 256;

template <typename Real>
R1KERN_INLINE void scores_of(const Real* logits, const Real* bias, std::int64_t E, Real* score,
                             Real* choice, Real* total) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t e = 0; e < E; ++e) {
    // exp of the negative magnitude cannot overflow.
    const Real x = logits[e];
    const Real p = fast_exp(x < 0 ? x : -x);
    const Real s = (x < 0 ? p : Real(1)) / (1 + p);
    const Real c = s + bias[e];
    score[e] = s;
    choice[e] = c == c ? c : infinity;
    sum += s;
  }
  *total = sum;
}

R1KERN_CLONES void sigmoid_of(const float* logits, const float* bias, std::int64_t E, float* score,
                              float* choice, float* total) {
  scores_of(logits, bias, E, score, choice, total);
}

void sigmoid_of(const double* logits, const double* bias, std::int64_t E, double* score,
                double* choice, double* total) {
  scores_of(logits, bias, E, score, choice, total);
}

R1KERN_CLONES void add_shares(const float* score, float over, std::int64_t E, double* sums) {
  for (std::int64_t e = 0; e < E; ++e) sums[e] += score[e] * over;
}

void add_shares(const double* score, double over, std::int64_t E, double* sums) {
  for (std::int64_t e = 0; e < E; ++e) sums[e] += score[e] * over;
}

// The greatest `size` values offered, greatest first; of equal ones the first offered comes first.
template <typename Real>
struct Best {
  Best(Real* values, std::int64_t* indices, std::int64_t size)
      : values(values), indices(indices), size(size) {}

  void offer(Real value, std::int64_t index) {
    if (filled == size && !(value > values[size - 1])) return;
    std::int64_t i = filled < size ? filled++ : size - 1;
    for (; i > 0 && value > values[i - 1]; --i) {
      values[i] = values[i - 1];
      indices[i] = indices[i - 1];
    }
    values[i] = value;
    indices[i] = index;
  }

  Real* values;
  std::int64_t* indices;
  std::int64_t size, filled = 0;
};

template <typename Real>
Real best_two(const Real* x, std::int64_t size) {
  if (size == 1) return x[0];
  Real first = std::max(x[0], x[1]), second = std::min(x[0], x[1]);
  for (std::int64_t i = 2; i < size; ++i) {
    second = std::max(second, std::min(first, x[i]));
    first = std::max(first, x[i]);
  }
  return first + second;
}

// Routes single tokens; holds the buffers of one thread.
template <typename Real>
class Selector {
 public:
  explicit Selector(const RouteShape& shape)
      : shape_(shape),
        score_(shape.E),
        choice_(shape.E),
        best_(std::max(shape.K, shape.topk_groups)),
        groups_(shape.topk_groups) {}

  void select(const Real* logits, const Real* bias, Real* weights, std::int64_t* indices,
              double* shares) {
    Real total;
    sigmoid_of(logits, bias, shape_.E, score_.data(), choice_.data(), &total);
    add_shares(score_.data(), 1 / total, shape_.E, shares);
    choose(indices);

    Real sum = Real(1e-20);
    for (std::int64_t k = 0; k < shape_.K; ++k) sum += weights[k] = score_[indices[k]];
    const Real factor = static_cast<Real>(shape_.scale) / (shape_.normalize ? sum : 1);
    for (std::int64_t k = 0; k < shape_.K; ++k) weights[k] *= factor;
  }

 private:
  void choose(std::int64_t* indices) {
    const std::int64_t size = shape_.E / shape_.groups;
    Best<Real> groups(best_.data(), groups_.data(), shape_.topk_groups);
    for (std::int64_t g = 0; g < shape_.groups; ++g) {
      // All groups stay: which is best does not matter.
      groups.offer(shape_.topk_groups == shape_.groups ? Real(0)
                                                       : best_two(&choice_[g * size], size),
                   g);
    }
    std::sort(groups_.begin(), groups_.end());
    Best<Real> experts(best_.data(), indices, shape_.K);
    for (const std::int64_t g : groups_) {
      for (std::int64_t e = g * size; e < (g + 1) * size; ++e) experts.offer(choice_[e], e);
    }
  }

  const RouteShape& shape_;
  std::vector<Real> score_, choice_, best_;
  std::vector<std::int64_t> groups_;
};

// Turns counts by block into each block's first slot of every expert, and fills counts and offsets.
template <typename Real>
void lay_out(std::vector<std::int64_t>& table, std::int64_t blocks, const RouteShape& shape,
             const RouteOut<Real>& out) {
  out.offsets[0] = 0;
  for (std::int64_t e = 0; e < shape.E; ++e) {
    std::int64_t next = out.offsets[e];
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t count = table[b * shape.E + e];
      table[b * shape.E + e] = next;
      next += count;
    }
    out.counts[e] = next - out.offsets[e];
    out.offsets[e + 1] = (next + shape.align - 1) / shape.align * shape.align;
  }
}

}  // namespace

template <typename Real>
void route(const Real* logits, const Real* bias, const RouteShape& shape,
           const RouteOut<Real>& out, int threads) {
  const std::int64_t T = shape.T, E = shape.E, K = shape.K;
  const std::int64_t blocks = (T + kBlock - 1) / kBlock;
  std::vector<std::int64_t> table(blocks * E);
  std::vector<double> shares(blocks * E);
#pragma omp parallel num_threads(threads)
  {
    Selector<Real> selector(shape);
#pragma omp for schedule(static)
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t t = b * kBlock; t < std::min((b + 1) * kBlock, T); ++t) {
        selector.select(logits + t * E, bias, out.weights + t * K, out.indices + t * K,
                        &shares[b * E]);
        for (std::int64_t k = 0; k < K; ++k) ++table[b * E + out.indices[t * K + k]];
      }
    }
  }
  lay_out(table, blocks, shape, out);
  if (shape.align > 1) std::fill(out.order, out.order + shape.R, -1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t end = std::min((b + 1) * kBlock, T) * K;
    for (std::int64_t i = b * kBlock * K; i < end; ++i) {
      const std::int64_t slot = table[b * E + out.indices[i]]++;
      out.slots[i] = static_cast<std::int32_t>(slot);
      out.order[slot] = static_cast<std::int32_t>(i);
    }
  }
  for (std::int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (std::int64_t b = 0; b < blocks; ++b) sum += shares[b * E + e];
    out.score_sums[e] = static_cast<Real>(sum);
  }
}

template void route(const float*, const float*, const RouteShape&, const RouteOut<float>&, int);
template void route(const double*, const double*, const RouteShape&, const RouteOut<double>&, int);

}  // namespace r1kern
