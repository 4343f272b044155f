#pragma once

#include <cstddef>

namespace r1kern {

// Asks for huge pages under memory that is about to be written for the first time: 4 KiB pages cost
// more to fault in than the data to write.  A hint: nothing happens where it cannot be followed.
void prefer_huge_pages(void* start, std::size_t bytes);

}  // namespace r1kern
