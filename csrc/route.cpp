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

// The greatest value of x, NaN left out (-infinity if there is no other).
template <typename Real>
R1KERN_INLINE Real greatest(const Real* x, std::int32_t n) {
  Real top = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : top)
  for (std::int32_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Where x first equals `value`; n if nowhere.
template <typename Real>
R1KERN_INLINE std::int32_t first_of(const Real* x, std::int32_t n, Real value) {
  std::int32_t first = n;
#pragma omp simd reduction(min : first)
  for (std::int32_t i = 0; i < n; ++i) {
    const std::int32_t here = x[i] == value ? i : n;
    first = here < first ? here : first;
  }
  return first;
}

// The best two values of each of kLanes interleaved parts of what was added.
template <typename Real>
struct BestTwo {
  static constexpr std::int32_t kLanes = 16;
  Real high[kLanes], low[kLanes];

  R1KERN_INLINE BestTwo() {
    for (std::int32_t j = 0; j < kLanes; ++j) {
      high[j] = low[j] = -std::numeric_limits<Real>::infinity();
    }
  }

  R1KERN_INLINE void add(std::int32_t j, Real x) {
    const Real smaller = x > high[j] ? high[j] : x;
    high[j] = x > high[j] ? x : high[j];
    low[j] = smaller > low[j] ? smaller : low[j];
  }

  R1KERN_INLINE Real sum(const Real* x, std::int32_t n) {
    std::int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (std::int32_t j = 0; j < kLanes; ++j) add(j, x[i + j]);
    }
    for (std::int32_t j = 0; i + j < n; ++j) add(j, x[i + j]);
    // The lower half of the lanes takes the upper half in, until one lane has all.
    for (std::int32_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int32_t j = 0; j < half; ++j) {
        low[j] = low[j + half] > low[j] ? low[j + half] : low[j];
        add(j, high[j + half]);
      }
    }
    return high[0] + low[0];
  }
};

// The `topk_groups` best groups, in ascending order, into `chosen`.
template <typename Real>
R1KERN_INLINE void choose_groups(const Real* choice, const RouteShape& shape, Real* score,
                                 std::int64_t* chosen) {
  const std::int64_t size = shape.E / shape.groups, kept = shape.topk_groups;
  for (std::int64_t g = 0; g < shape.groups && kept < shape.groups; ++g) {
    score[g] = BestTwo<Real>().sum(choice + g * size, static_cast<std::int32_t>(size));
  }
  std::int64_t filled = 0;
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    // Groups that beat this one: greater, or equal and before it.
    std::int64_t better = 0;
    for (std::int64_t o = 0; o < shape.groups && kept < shape.groups; ++o) {
      better += score[o] > score[g] || (score[o] == score[g] && o < g);
    }
    if (better < kept) chosen[filled++] = g;
  }
}

// The K best experts of the chosen groups, best first.  Takes them out of `choice` (as NaN).
template <typename Real>
R1KERN_INLINE void choose_experts(Real* choice, const RouteShape& shape,
                                  const std::int64_t* chosen, Real* top, std::int64_t* indices) {
  constexpr Real taken = std::numeric_limits<Real>::quiet_NaN();
  const auto size = static_cast<std::int32_t>(shape.E / shape.groups);
  const std::int64_t kept = shape.topk_groups;
  for (std::int64_t i = 0; i < kept; ++i) top[i] = greatest(choice + chosen[i] * size, size);
  for (std::int64_t k = 0; k < shape.K; ++k) {
    std::int64_t best = 0;
    for (std::int64_t i = 1; i < kept; ++i) {
      if (top[i] > top[best] || top[best] != top[best]) best = i;
    }
    Real* group = choice + chosen[best] * size;
    const std::int32_t e = first_of(group, size, top[best]);
    indices[k] = chosen[best] * size + e;
    group[e] = taken;
    top[best] = greatest(group, size);
    // An emptied group is no candidate any more; -infinity may still be a value of it.
    if (top[best] == -std::numeric_limits<Real>::infinity() &&
        std::all_of(group, group + size, [](Real x) { return x != x; })) {
      top[best] = taken;
    }
  }
}

R1KERN_CLONES void choose_of(float* choice, const RouteShape& shape, float* score,
                             std::int64_t* chosen, std::int64_t* indices) {
  choose_groups(choice, shape, score, chosen);
  choose_experts(choice, shape, chosen, score, indices);
}

void choose_of(double* choice, const RouteShape& shape, double* score, std::int64_t* chosen,
               std::int64_t* indices) {
  choose_groups(choice, shape, score, chosen);
  choose_experts(choice, shape, chosen, score, indices);
}

// Routes single tokens; holds the buffers of one thread.
template <typename Real>
class Selector {
 public:
  explicit Selector(const RouteShape& shape)
      : shape_(shape),
        score_(shape.E),
        choice_(shape.E),
        group_score_(shape.groups),
        chosen_(shape.topk_groups) {}

  void select(const Real* logits, const Real* bias, Real* weights, std::int64_t* indices,
              double* shares) {
    Real total;
    sigmoid_of(logits, bias, shape_.E, score_.data(), choice_.data(), &total);
    add_shares(score_.data(), 1 / total, shape_.E, shares);
    choose_of(choice_.data(), shape_, group_score_.data(), chosen_.data(), indices);

    Real sum = Real(1e-20);
    for (std::int64_t k = 0; k < shape_.K; ++k) sum += weights[k] = score_[indices[k]];
    const Real factor = static_cast<Real>(shape_.scale) / (shape_.normalize ? sum : 1);
    for (std::int64_t k = 0; k < shape_.K; ++k) weights[k] *= factor;
  }

 private:
  const RouteShape& shape_;
  std::vector<Real> score_, choice_, group_score_;
  std::vector<std::int64_t> chosen_;
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
