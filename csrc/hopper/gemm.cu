// out[r, n] = sum over kb of a_scales[kb, r] b_scales[e, n / 128, kb] (a[r] . b[e, n] in block kb),
// e being the expert that row r belongs to; DeepSeek-V3's recipe (arXiv 2412.19437, 3.3.2): the
// tensor core sums 128 products, then each sum is scaled and added in float32 registers.
//
// Legend: E experts, R rows, N columns, K contracted, kb blocks of 128 of K.
#include "launch.cuh"
#include "pipeline.cuh"

namespace r1kern::hopper {
namespace {

struct Bf16 {
  std::uint16_t bits;
};

using GemmShared = Shared<ROWS, 0>;

struct Args {
  const std::int64_t* offsets;
  const float* b_scales;
  std::int64_t expert_stride, block_stride, depth_stride;  // of b_scales, in elements
  void* out;
  int E, N, blocks_of_k;
};

__device__ __forceinline__ void produce(GemmShared& shared, const CUtensorMap* a,
                                        const CUtensorMap* a_scales, const CUtensorMap* b,
                                        const Args& args) {
  const int columns = (args.N + COLUMNS - 1) / COLUMNS;
  const int tiles = shared.groups.blocks[args.E] * columns;
  for (const CUtensorMap* map : {a, a_scales, b}) ptx::prefetch(map);
  Slot slot;
  int expert = 0;
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = ragged_tile(shared.groups.blocks, columns, i, expert);
    const int row = shared.groups.row[tile.expert] + tile.row * ROWS;
    for (int kb = 0; kb < args.blocks_of_k; ++kb, slot.advance()) {
      open(shared, slot);
      std::uint64_t* full = &shared.full[slot.stage];
      ptx::load(shared.a[slot.stage], a, full, kb * DEPTH, row);
      ptx::load(shared.a_scales[slot.stage], a_scales, full, row, kb);
      ptx::load(shared.b[slot.stage], b, full, kb * DEPTH, tile.column * COLUMNS, tile.expert);
    }
  }
}

__device__ __forceinline__ void promote(float (&sum)[64], const float (&part)[64], float upper,
                                        float lower) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    sum[4 * j] += upper * part[4 * j];
    sum[4 * j + 1] += upper * part[4 * j + 1];
    sum[4 * j + 2] += lower * part[4 * j + 2];
    sum[4 * j + 3] += lower * part[4 * j + 3];
  }
}

// Word j of the quad's lane c goes to word c of lane j.
__device__ __forceinline__ void transpose(std::uint32_t (&word)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = threadIdx.x & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const std::uint32_t sent = high ? word[j] : word[j | bit];
      const std::uint32_t got = __shfl_xor_sync(~0u, sent, bit);
      (high ? word[j] : word[j | bit]) = got;
    }
  }
}

// 128 columns of one row: the quad holds them by pairs, and writes 64 bytes at a time.
__device__ __forceinline__ void store(Bf16* out, const float (&sum)[64], int lower,
                                      bool inside) {
#pragma unroll
  for (int j = 0; j < 16; j += 4) {
    std::uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int d = 4 * (j + q) + 2 * lower;
      word[q] = ptx::bf16_pair(sum[d], sum[d + 1]);
    }
    transpose(word);
    auto* to = reinterpret_cast<uint4*>(out + 8 * j) + threadIdx.x % 4;
    if (inside) *to = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__device__ __forceinline__ void store(float* out, const float (&sum)[64], int lower, bool inside) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int d = 4 * j + 2 * lower;
    auto* to = reinterpret_cast<float2*>(out + 8 * j) + threadIdx.x % 4;
    if (inside) *to = make_float2(sum[d], sum[d + 1]);
  }
}

template <typename Out>
__device__ __forceinline__ void consume(GemmShared& shared, const Args& args) {
  const int columns = (args.N + COLUMNS - 1) / COLUMNS;
  const int tiles = shared.groups.blocks[args.E] * columns;
  const Lane lane;
  Slot slot;
  int expert = 0;
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = ragged_tile(shared.groups.blocks, columns, i, expert);
    const int column = tile.column * COLUMNS;
    const bool wide = column + COLUMNS / 2 < args.N;  // else the right half is beyond N
    const float* scale = args.b_scales + tile.expert * args.expert_stride +
                         column / DEPTH * args.block_stride;
    const std::int64_t right = wide ? args.block_stride : 0;
    float left_next = __ldg(scale), right_next = __ldg(scale + right);

    float sum[2][64] = {}, part[64];
    for (int kb = 0; kb < args.blocks_of_k; ++kb, slot.advance()) {
      const float left_scale = left_next, right_scale = right_next;
      if (kb + 1 < args.blocks_of_k) scale += args.depth_stride;
      left_next = __ldg(scale), right_next = __ldg(scale + right);

      ptx::barrier_wait(&shared.full[slot.stage], slot.parity);
      const std::uint8_t* a = shared.a[slot.stage] + lane.group * (A_BYTES / 2);
      const std::uint8_t* b = shared.b[slot.stage];
      const float upper = shared.a_scales[slot.stage][lane.row];
      const float lower = shared.a_scales[slot.stage][lane.row + 8];
      multiply(part, a, b);
      promote(sum[0], part, upper * left_scale, lower * left_scale);
      multiply(part, a, b + B_BYTES / 2);
      release(shared, slot);
      promote(sum[1], part, upper * right_scale, lower * right_scale);
    }

    const int end = shared.groups.row[tile.expert + 1];
    const int row = shared.groups.row[tile.expert] + tile.row * ROWS + lane.row;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int r = row + 8 * lower;
      Out* out = static_cast<Out*>(args.out) + static_cast<std::int64_t>(r) * args.N + column;
      store(out, sum[0], lower, r < end);
      store(out + COLUMNS / 2, sum[1], lower, r < end && wide);
    }
  }
}

template <typename Out>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap a,
                        const __grid_constant__ CUtensorMap a_scales,
                        const __grid_constant__ CUtensorMap b, const Args args) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<GemmShared*>(memory);
  start(shared, args.offsets, args.E);
  if (threadIdx.x < WARPGROUP) {
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(shared, &a, &a_scales, &b, args);
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    consume<Out>(shared, args);
  }
}

}  // namespace

void grouped_gemm(const Gemm& x) {
  const Launch launch(x.device, x.stream);
  const CUtensorMap a = bytes_map(x.a, {x.K, x.R}, ROWS);
  const CUtensorMap b = bytes_map(x.b, {x.K, x.N, x.E}, COLUMNS);
  const CUtensorMap a_scales = floats_map(x.a_scales, x.R, x.K / DEPTH, x.a_scales_stride, ROWS);
  const Args args{reinterpret_cast<const std::int64_t*>(x.offsets),
                  reinterpret_cast<const float*>(x.b_scales),
                  x.b_scales_expert_stride,
                  x.b_scales_block_stride,
                  x.b_scales_depth_stride,
                  reinterpret_cast<void*>(x.out),
                  static_cast<int>(x.E),
                  static_cast<int>(x.N),
                  static_cast<int>(x.K / DEPTH)};
  const auto kernel =
      x.out_is_float ? grouped_gemm_kernel<float> : grouped_gemm_kernel<Bf16>;
  launch(kernel, sizeof(GemmShared), THREADS, a, a_scales, b, args);
}

std::size_t grouped_gemm_shared_memory() { return sizeof(GemmShared); }

}  // namespace r1kern::hopper
