// What both kernels share: warpgroup roles, the ring of shared-memory stages, one 64 x 256 product.
//
// A block is 3 warpgroups: the producer, one thread of which drives the copy engine, and two
// consumers of 64 rows each of a 128 x 256 tile.  A stage holds 128 of the contracted dimension.
#pragma once

#include "ptx.cuh"
#include "schedule.h"

namespace r1kern::hopper {

constexpr int STAGES = 4;
constexpr int DEPTH = 128;  // of the contracted dimension in a stage, one byte each
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int MAX_EXPERTS = 1024;
// 40 + 2 * 232 registers for the three threads of a column: 504 of the 512 there are.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

constexpr int A_BYTES = ROWS * DEPTH, B_BYTES = COLUMNS * DEPTH;

// Where each expert's rows and row tiles start; row[E] and blocks[E] are the ends.
struct Groups {
  int row[MAX_EXPERTS + 1];
  int blocks[MAX_EXPERTS + 1];
};

// A_SCALES and B_SCALES: float32 scales that a stage brings along, rows 16-byte multiples.
template <int A_SCALES, int B_SCALES>
struct alignas(1024) Shared {
  std::uint8_t a[STAGES][A_BYTES];
  std::uint8_t b[STAGES][B_BYTES];
  float a_scales[STAGES][A_SCALES];
  float b_scales[STAGES][B_SCALES > 0 ? B_SCALES : 32];
  std::uint64_t full[STAGES], empty[STAGES];
  Groups groups;
  static constexpr std::uint32_t STAGE_BYTES = A_BYTES + B_BYTES + 4 * (A_SCALES + B_SCALES);
};

// A position in the ring; `parity` is that of the phase in which this round's data arrive.
struct Slot {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// One warp: the running sums over the experts' sizes, which only the device knows.
__device__ __forceinline__ void find_groups(Groups& groups, const std::int64_t* offsets, int E) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < E; first += 32) {
    const int e = first + lane;
    const int begin = static_cast<int>(offsets[e < E ? e : E]);
    const int end = static_cast<int>(offsets[e < E ? e + 1 : E]);
    const int blocks = (end - begin + ROWS - 1) / ROWS;
    int sum = blocks;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (e < E) {
      groups.row[e] = begin;
      groups.blocks[e] = total + sum - blocks;
    }
    total += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) {
    groups.row[E] = static_cast<int>(offsets[E]);
    groups.blocks[E] = total;
  }
}

template <typename S>
__device__ __forceinline__ void start(S& shared, const std::int64_t* offsets, int E) {
  if (threadIdx.x == 0) {
    if (ptx::shared_address(&shared) % 1024) __trap();  // the swizzle counts from 1024
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(&shared.full[stage], 1);
      ptx::barrier_init(&shared.empty[stage], CONSUMERS * WARPGROUP / 32);
    }
    ptx::fence_barrier_init();
  }
  if (threadIdx.x / 32 == 1) find_groups(shared.groups, offsets, E);
  __syncthreads();
}

// The producer's half of a stage: waits until it is free, announces the bytes to come.
template <typename S>
__device__ __forceinline__ void open(S& shared, const Slot& slot) {
  ptx::barrier_wait(&shared.empty[slot.stage], slot.parity ^ 1);
  ptx::barrier_arrive_expect(&shared.full[slot.stage], S::STAGE_BYTES);
}

// A consumer warp has read the last of a stage.
template <typename S>
__device__ __forceinline__ void release(S& shared, const Slot& slot) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::barrier_arrive(&shared.empty[slot.stage]);
}

// The matrix descriptor of K-major rows of 128 bytes, swizzled by 128 bytes, from a start that is
// a multiple of 1024: groups of 8 rows lie 1024 bytes apart.  Adding 2 moves it by 32 bytes.
__device__ __forceinline__ std::uint64_t descriptor(const void* rows) {
  constexpr std::uint64_t swizzle_128 = 1ull << 62, stride = (1024ull >> 4) << 32;
  constexpr std::uint64_t leading = 1ull << 16;  // not read in swizzled K-major layouts
  return swizzle_128 | stride | leading | ((ptx::shared_address(rows) & 0x3FFFF) >> 4);
}

// part[64 x 128] = the warpgroup's 64 rows of `a` times 128 rows of `b`, over a stage's depth.
__device__ __forceinline__ void multiply(float (&part)[64], const std::uint8_t* a,
                                         const std::uint8_t* b) {
  const std::uint64_t from_a = descriptor(a), from_b = descriptor(b);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < DEPTH / 32; ++i) ptx::wgmma(part, from_a + 2 * i, from_b + 2 * i, i > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait(part);
}

// Where a consumer thread's accumulators lie.  Of 64 x 128 values it holds, for j < 16, columns
// 8 j + `column` and the next: in d[4 j] and d[4 j + 1] of `row`, in the next two of row + 8.
struct Lane {
  int group, row, column;  // the warpgroup's 64 rows; row in the tile; column in 8
  __device__ __forceinline__ Lane() {
    const int thread = threadIdx.x - WARPGROUP;
    group = __shfl_sync(~0u, thread / WARPGROUP, 0);  // tells the compiler that it is uniform
    row = thread / 32 * 16 + thread % 32 / 4;
    column = thread % 4 * 2;
  }
};

}  // namespace r1kern::hopper
