// grads[e][n, k] += sum over the blocks pb of expert e of
//     a_scales[pb, n] b_scales[pb, k] (sum over the 128 rows p of pb: a_t[n, p] b_t[k, p]),
// the weight gradient of DeepSeek-V3's recipe (arXiv 2412.19437, 3.3.2): both operands have a scale
// per 128 rows of one column, and each block's sum is scaled and added in float32 registers.
//
// Legend: E experts, N out, K in, P rows of the padded layout in which an expert starts at a
// multiple of 128, pb blocks of 128 of P.
#include "launch.cuh"
#include "pipeline.cuh"

namespace r1kern::hopper {
namespace {

using WgradShared = Shared<ROWS, COLUMNS>;

struct Args {
  const std::int64_t* offsets;
  float* const* grads;
  int E, N, K;
};

struct Tiles {
  int rows, columns, count;
  __device__ __forceinline__ explicit Tiles(const Args& args)
      : rows((args.N + ROWS - 1) / ROWS),
        columns((args.K + COLUMNS - 1) / COLUMNS),
        count(args.E * rows * columns) {}
};

__device__ __forceinline__ void produce(WgradShared& shared, const CUtensorMap* a,
                                        const CUtensorMap* a_scales, const CUtensorMap* b,
                                        const CUtensorMap* b_scales, const Args& args) {
  const Tiles tiles(args);
  for (const CUtensorMap* map : {a, a_scales, b, b_scales}) ptx::prefetch(map);
  Slot slot;
  for (int i = blockIdx.x; i < tiles.count; i += gridDim.x) {
    const Tile tile = even_tile(i, tiles.rows, tiles.columns);
    const int n = tile.row * ROWS, k = tile.column * COLUMNS;
    const int end = shared.groups.blocks[tile.expert + 1];
    for (int pb = shared.groups.blocks[tile.expert]; pb < end; ++pb, slot.advance()) {
      open(shared, slot);
      std::uint64_t* full = &shared.full[slot.stage];
      ptx::load(shared.a[slot.stage], a, full, pb * DEPTH, n);
      ptx::load(shared.a_scales[slot.stage], a_scales, full, n, pb);
      ptx::load(shared.b[slot.stage], b, full, pb * DEPTH, k);
      ptx::load(shared.b_scales[slot.stage], b_scales, full, k, pb);
    }
  }
}

// `column`: the scales of 128 columns, from this thread's first.
__device__ __forceinline__ void promote(float (&sum)[64], const float (&part)[64], float upper,
                                        float lower, const float* column) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(column + 8 * j);
    sum[4 * j] += upper * part[4 * j] * scale.x;
    sum[4 * j + 1] += upper * part[4 * j + 1] * scale.y;
    sum[4 * j + 2] += lower * part[4 * j + 2] * scale.x;
    sum[4 * j + 3] += lower * part[4 * j + 3] * scale.y;
  }
}

__device__ __forceinline__ void accumulate(float* grad, int K, const float (&sum)[64]) {
  float* below = grad + 8 * static_cast<std::int64_t>(K);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    ptx::add(grad + 8 * j, sum[4 * j], sum[4 * j + 1]);
    ptx::add(below + 8 * j, sum[4 * j + 2], sum[4 * j + 3]);
  }
}

__device__ __forceinline__ void consume(WgradShared& shared, const Args& args) {
  const Tiles tiles(args);
  const Lane lane;
  Slot slot;
  for (int i = blockIdx.x; i < tiles.count; i += gridDim.x) {
    const Tile tile = even_tile(i, tiles.rows, tiles.columns);
    const int blocks = shared.groups.blocks[tile.expert + 1] - shared.groups.blocks[tile.expert];
    if (blocks == 0) continue;

    float sum[2][64] = {}, part[64];
    for (int pb = 0; pb < blocks; ++pb, slot.advance()) {
      ptx::barrier_wait(&shared.full[slot.stage], slot.parity);
      const std::uint8_t* a = shared.a[slot.stage] + lane.group * (A_BYTES / 2);
      const std::uint8_t* b = shared.b[slot.stage];
      const float upper = shared.a_scales[slot.stage][lane.row];
      const float lower = shared.a_scales[slot.stage][lane.row + 8];
      const float* column = shared.b_scales[slot.stage] + lane.column;
      multiply(part, a, b);
      promote(sum[0], part, upper, lower, column);
      multiply(part, a, b + B_BYTES / 2);
      promote(sum[1], part, upper, lower, column + COLUMNS / 2);
      release(shared, slot);
    }

    const std::int64_t n = tile.row * ROWS + lane.row;
    const int k = tile.column * COLUMNS;
    float* grad = args.grads[tile.expert] + n * args.K + k + lane.column;
    accumulate(grad, args.K, sum[0]);
    if (k + COLUMNS / 2 < args.K) accumulate(grad + COLUMNS / 2, args.K, sum[1]);
  }
}

__global__ void __launch_bounds__(THREADS, 1)
    grouped_wgrad_kernel(const __grid_constant__ CUtensorMap a,
                         const __grid_constant__ CUtensorMap a_scales,
                         const __grid_constant__ CUtensorMap b,
                         const __grid_constant__ CUtensorMap b_scales, const Args args) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<WgradShared*>(memory);
  start(shared, args.offsets, args.E);
  if (threadIdx.x < WARPGROUP) {
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(shared, &a, &a_scales, &b, &b_scales, args);
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    consume(shared, args);
  }
}

}  // namespace

void grouped_wgrad(const Wgrad& x) {
  const Launch launch(x.device, x.stream);
  const CUtensorMap a = bytes_map(x.a_t, {x.P, x.N}, ROWS);
  const CUtensorMap b = bytes_map(x.b_t, {x.P, x.K}, COLUMNS);
  const CUtensorMap a_scales = floats_map(x.a_scales, x.N, x.P / DEPTH, x.N, ROWS);
  const CUtensorMap b_scales = floats_map(x.b_scales, x.K, x.P / DEPTH, x.K, COLUMNS);
  const Args args{reinterpret_cast<const std::int64_t*>(x.offsets),
                  reinterpret_cast<float* const*>(x.grads), static_cast<int>(x.E),
                  static_cast<int>(x.N), static_cast<int>(x.K)};
  launch(grouped_wgrad_kernel, sizeof(WgradShared), THREADS, a, a_scales, b, b_scales, args);
}

std::size_t grouped_wgrad_shared_memory() { return sizeof(WgradShared); }

}  // namespace r1kern::hopper
