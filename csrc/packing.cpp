#include "packing.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace r1kern {
namespace {

void check(const std::int64_t* lengths, std::size_t count, std::int64_t budget) {
  if (budget < 1) {
    throw std::invalid_argument("the token budget is " + std::to_string(budget) +
                                ": it must be at least 1");
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (lengths[i] < 0) {
      throw std::invalid_argument("sequence " + std::to_string(i) + " has length " +
                                  std::to_string(lengths[i]) + ": it must not be negative");
    }
    if (lengths[i] > budget) {
      throw std::invalid_argument("sequence " + std::to_string(i) + " has " +
                                  std::to_string(lengths[i]) + " tokens, more than the budget of " +
                                  std::to_string(budget) +
                                  ": raise the token budget or shorten the sequence");
    }
  }
}

// Free room of each bin, and the first bin with room for a length in O(log bins): a binary tree
// over the bins whose node k holds the largest room among its children 2k and 2k + 1.
class Rooms {
 public:
  Rooms(std::size_t bins, std::int64_t budget) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, budget);
  }

  std::size_t place(std::int64_t length) {
    std::size_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (room_[node] < length) ++node;
    }
    const std::size_t bin = node - leaves_;
    room_[node] -= length;
    while (node > 1) {
      node /= 2;
      room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    }
    return bin;
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> room_;
};

}  // namespace

std::vector<std::int64_t> pack_ffd(const std::int64_t* lengths, std::size_t count,
                                   std::int64_t budget) {
  check(lengths, count, budget);
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [lengths](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });

  Rooms rooms(count, budget);
  std::vector<std::int64_t> bins(count);
  for (const std::size_t i : order) bins[i] = static_cast<std::int64_t>(rooms.place(lengths[i]));
  return bins;
}

std::vector<std::int64_t> pack_even(const std::int64_t* lengths, const double* costs,
                                    std::size_t count, std::int64_t budget, std::size_t bins) {
  check(lengths, count, budget);
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [costs](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });

  std::vector<std::int64_t> room(bins, budget), chosen(count);
  std::vector<double> load(bins, 0.0);
  for (const std::size_t i : order) {
    std::size_t best = bins;
    for (std::size_t b = 0; b < bins; ++b) {
      if (room[b] >= lengths[i] && (best == bins || load[b] < load[best])) best = b;
    }
    if (best == bins) return {};
    room[best] -= lengths[i];
    load[best] += costs[i];
    chosen[i] = static_cast<std::int64_t>(best);
  }
  return chosen;
}

}  // namespace r1kern
