// Which tile a block of threads works on: plain arithmetic, the same on the device and the host.
//
// Legend: E experts; a row tile is 128 rows of one expert, a column tile 256 columns.
// `blocks` [E + 1] is the running sum of the experts' row tiles: expert e has those from blocks[e]
// to blocks[e + 1], counted over all experts.
#pragma once

#ifdef __CUDACC__
#define R1KERN_BOTH __host__ __device__ __forceinline__
#else
#define R1KERN_BOTH inline
#endif

namespace r1kern::hopper {

constexpr int ROWS = 128, COLUMNS = 256;

struct Tile {
  int expert, row, column;  // row and column in tiles, within the expert's output
};

// Row tiles walked together before the next column tile: with 132 blocks at work, 16 x 8 tiles
// of 128 x 256 make both operands' share of the traffic equal.
constexpr int BAND = 16;

// Tile `i` of rows x columns tiles: bands of BAND row tiles, in a band column by column.
R1KERN_BOTH Tile place(int expert, int i, int rows, int columns) {
  const int first = i / (BAND * columns) * BAND;
  const int band = rows - first < BAND ? rows - first : BAND;
  const int within = i - first * columns;
  return {expert, first + within % band, within / band};
}

// Tile `i` of a grouped product whose rows are ragged.  `expert` is where the search starts: 0 at
// first, then what the caller's last tile (a smaller `i`) has left there.
R1KERN_BOTH Tile ragged_tile(const int* blocks, int columns, int i, int& expert) {
  const int block = i / columns;
  while (blocks[expert + 1] <= block) ++expert;
  const int before = blocks[expert];
  return place(expert, i - before * columns, blocks[expert + 1] - before, columns);
}

// Tile `i` of E outputs of rows x columns tiles each.
R1KERN_BOTH Tile even_tile(int i, int rows, int columns) {
  const int expert = i / (rows * columns);
  return place(expert, i - expert * rows * columns, rows, columns);
}

}  // namespace r1kern::hopper
