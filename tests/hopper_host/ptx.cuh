// csrc/hopper/ptx.cuh for the host: each instruction does what the PTX ISA says of it.
//
// What a thread may not rely on yet is spoilt: the target of a copy and the accumulators of a
// product hold NaN until they are waited for, and operands are read as late as they may be.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace r1kern::hopper {
namespace {  // each file of kernels has its own

alignas(1024) std::uint8_t memory[SHARED_MEMORY];  // a block's

namespace ptx {

using host::machine, host::require;

constexpr std::uint32_t BASE = 1024;  // where a block's dynamic shared memory begins
constexpr float NOT_YET = NAN;

inline std::uint32_t shared_address(const void* p) {
  return BASE + static_cast<std::uint32_t>(static_cast<const std::uint8_t*>(p) - memory);
}

inline std::uint8_t* at(std::uint32_t address) {
  require(address >= BASE && address < BASE + SHARED_MEMORY, "outside shared memory");
  return memory + (address - BASE);
}

// Within 1024 bytes the 16-byte chunks of line i of 128 bytes are exchanged by "xor i".
inline std::uint32_t swizzle(std::uint32_t address) {
  return address ^ (address / 128 % 8 * 16);
}

// mbarrier

inline void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  const int count = static_cast<int>(arrivals);
  machine.barriers[barrier] = {count, count};
}

inline void fence_barrier_init() {}

inline void barrier_arrive(std::uint64_t* barrier) {
  host::Barrier& x = machine.barrier(barrier);
  require(x.missing-- > 0, "an arrival too many");
  x.settle();
}

inline void barrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  machine.barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  const host::Barrier& x = machine.barrier(barrier);
  if (x.parity != parity) return;
  machine.wait(parity ? "mbarrier, phase 1" : "mbarrier, phase 0",
               [&x, parity] { return x.parity != parity; });
}

// The copy engine

inline void prefetch(const CUtensorMap*) {}

inline void copy(std::uint32_t to, const CUtensorMap& map, const std::int64_t (&from)[3]) {
  const std::int64_t line = map.box[0] * map.itemsize;
  for (std::int64_t z = 0; z < map.box[2]; ++z) {
    for (std::int64_t y = 0; y < map.box[1]; ++y, to += static_cast<std::uint32_t>(line)) {
      for (std::int64_t x = 0; x < map.box[0]; ++x) {
        const std::int64_t place[] = {from[0] + x, from[1] + y, from[2] + z};
        const std::uint8_t* source = map.address;
        bool inside = true;
        for (int i = 0; i < 3; ++i) {
          inside = inside && place[i] >= 0 && place[i] < map.sizes[i];
          source += place[i] * map.strides[i];
        }
        const auto address = to + static_cast<std::uint32_t>(x * map.itemsize);
        std::uint8_t* target = at(map.swizzled ? swizzle(address) : address);
        std::memset(target, 0, static_cast<std::size_t>(map.itemsize));
        if (inside) std::memcpy(target, source, static_cast<std::size_t>(map.itemsize));
      }
    }
  }
}

inline void load(void* to, const CUtensorMap* map, std::uint64_t* barrier, int x, int y,
                 int z = 0) {
  const std::uint32_t address = shared_address(to);
  const std::int64_t bytes = map->box[0] * map->box[1] * map->box[2] * map->itemsize;
  require(address % (map->swizzled ? 1024 : 128) == 0, "a copy to an address that is not aligned");
  std::memset(at(address), 0xFF, static_cast<std::size_t>(bytes));  // NaN in e4m3 and float32
  machine.copy([=, map = *map] {
    copy(address, map, {x, y, z});
    host::Barrier& landed = machine.barrier(barrier);
    landed.bytes -= bytes;
    require(landed.bytes >= 0, "a copy brought more bytes than were announced");
    landed.settle();
  });
}

// wgmma

constexpr int WARPGROUP = 128, M = 64, N = 128, K = 32;

struct Product {
  std::uint64_t a, b;
  bool add;
  bool operator==(const Product& other) const {
    return a == other.a && b == other.b && add == other.add;
  }
};

// Of each thread: products begun, and how many of them are committed.
struct Begun {
  std::vector<Product> products;
  std::size_t committed = 0;
  bool fenced = false;
} begun[1024];
float product[1024 / WARPGROUP][M][N];

inline float e4m3(std::uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  const float size = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7)
                              : std::ldexp(mantissa / 8.0f, -6);
  return code & 128 ? -size : size;
}

// 32 codes of each row: 8 rows lie 128 bytes apart, groups of 8 by the descriptor's stride.
template <int rows>
void read(float (&to)[rows][K], std::uint64_t descriptor) {
  static const auto values = [] {
    std::vector<float> all(256);
    for (int i = 0; i < 256; ++i) all[static_cast<std::size_t>(i)] = e4m3(static_cast<std::uint8_t>(i));
    return all;
  }();
  const auto start = static_cast<std::uint32_t>(descriptor & 0x3FFF) * 16;
  const auto stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
  require(descriptor >> 62 == 1, "not the layout of 128-byte swizzling");
  require((descriptor >> 49 & 7) == 0, "the pattern begins elsewhere");
  for (std::uint32_t r = 0; r < rows; ++r) {
    for (std::uint32_t k = 0; k < K; ++k) {
      to[r][k] = values[*at(swizzle(start + r / 8 * stride + r % 8 * 128 + k))];
    }
  }
}

inline void multiply(const std::vector<Product>& products, float (&sum)[M][N]) {
  static float a[M][K], b[N][K], turned[K][N];
  for (const Product& x : products) {
    read(a, x.a), read(b, x.b);
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < K; ++k) turned[k][n] = b[n][k];
    }
    if (!x.add) std::fill_n(&sum[0][0], M * N, 0.0f);
    for (int m = 0; m < M; ++m) {
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < N; ++n) sum[m][n] += a[m][k] * turned[k][n];
      }
    }
  }
}

inline void wgmma_fence() { begun[threadIdx.x] = {{}, 0, true}; }

inline void wgmma(float (&d)[64], std::uint64_t a, std::uint64_t b, int accumulate) {
  Begun& self = begun[threadIdx.x];
  require(self.fenced, "wgmma without a fence");
  require(accumulate || self.products.empty(), "a second product before the first is waited for");
  require(!accumulate || !self.products.empty(), "no product to add to");
  self.products.push_back({a, b, accumulate != 0});
  std::fill(d, d + 64, NOT_YET);
}

inline void wgmma_commit() {
  begun[threadIdx.x].committed = begun[threadIdx.x].products.size();
}

inline void wgmma_wait(float (&d)[64]) {
  Begun& self = begun[threadIdx.x];
  const unsigned group = threadIdx.x / WARPGROUP;
  machine.meet(WARPGROUP, "wgmma.wait_group");
  if (threadIdx.x % WARPGROUP == 0) {
    for (unsigned i = 0; i < WARPGROUP; ++i) {
      require(begun[threadIdx.x + i].products == self.products, "descriptors differ in a group");
    }
    require(self.committed == self.products.size(), "a product was not committed");
    multiply(self.products, product[group]);
  }
  machine.meet(WARPGROUP, "wgmma.wait_group, read");
  const unsigned thread = threadIdx.x % WARPGROUP;
  const unsigned row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (unsigned i = 0; i < 64; ++i) {
    d[i] = product[group][row + i / 2 % 2 * 8][i / 4 * 8 + column + i % 2];
  }
  machine.meet(WARPGROUP, "wgmma.wait_group, done");
  self = {};
}

// Registers: only that a whole warpgroup asks for them.

template <int count>
void give_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  machine.meet(WARPGROUP, "setmaxnreg.dec");
}

template <int count>
void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  machine.meet(WARPGROUP, "setmaxnreg.inc");
}

// The rest

inline std::uint32_t bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bits >> 16 | 64;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline std::uint32_t bf16_pair(float x, float y) { return bf16(y) << 16 | bf16(x); }

inline void add(float* to, float x, float y) {
  require(reinterpret_cast<std::uintptr_t>(to) % 8 == 0, "red.v2 to an address that is not aligned");
  to[0] += x, to[1] += y;
}

}  // namespace ptx
}  // namespace
}  // namespace r1kern::hopper
