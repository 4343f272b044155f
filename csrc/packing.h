#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace r1kern {

// First-fit-decreasing bin packing (Johnson 1973: at most 11/9 of the fewest bins, plus 6/9).
//
// Takes `count` sequence lengths in tokens and the tokens that fit a bin; returns the bin of each
// sequence, bins numbered from 0 in the order they are opened.  Longest first, ties by index, each
// into the first bin with room: the result is a function of the arguments alone.
// O(count log count).
//
// Throws std::invalid_argument where `budget` is below 1, or a length is negative or above `budget`.
std::vector<std::int64_t> pack_ffd(const std::int64_t* lengths, std::size_t count,
                                   std::int64_t budget);

}  // namespace r1kern
