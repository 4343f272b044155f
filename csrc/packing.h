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

// Longest-processing-time scheduling (Graham 1969) with room: dearest first, ties by index, each
// into the cheapest of `bins` bins that has room for its tokens.
//
// Takes the same lengths and budget, and what each sequence costs; returns the bin of each
// sequence, or nothing where one of them finds no room: then `pack_ffd` may still.
// O(count (log count + bins)).
//
// Throws std::invalid_argument as `pack_ffd` does.
std::vector<std::int64_t> pack_even(const std::int64_t* lengths, const double* costs,
                                    std::size_t count, std::int64_t budget, std::size_t bins);

}  // namespace r1kern
