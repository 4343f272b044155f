// The host's side of the Hopper kernels: their arguments, tensor maps and launches.
//
// Addresses are device addresses; strides count elements.  Everything here throws CudaError, one
// line, and nothing needs a driver before it is called.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <stdexcept>

namespace r1kern::hopper {

using Int = std::int64_t;
using Address = std::uintptr_t;

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws, naming what was tried, unless it went well.
void check(cudaError_t error, const char* what);

struct Gemm {
  int device;
  Address stream;
  Address a, a_scales, b, b_scales, offsets, out;
  Int R, N, K, E;
  Int a_stride, a_scales_stride, b_expert_stride, b_row_stride;
  Int b_scales_expert_stride, b_scales_block_stride, b_scales_depth_stride;
  bool out_is_float;
};
void grouped_gemm(const Gemm& x);

struct Wgrad {
  int device;
  Address stream;
  Address a_t, a_scales, b_t, b_scales, offsets, grads;
  Int P, N, K, E;
};
void grouped_wgrad(const Wgrad& x);

// 1-byte elements [sizes[2], sizes[1], sizes[0]], innermost first, `strides` of the outer two; read
// in boxes of `rows` x 128 bytes, swizzled by 128 bytes.  Without a third dimension: stride 0.
CUtensorMap bytes_map(Address address, std::array<Int, 3> sizes, std::array<Int, 2> strides,
                      int rows);

// float32 [rows, columns], read in boxes of 1 x `box`.
CUtensorMap floats_map(Address address, Int columns, Int rows, Int stride, int box);

// One block a multiprocessor, each with `shared` bytes of dynamic shared memory.
class Launch {
 public:
  Launch(int device, Address stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {
    check(cudaSetDevice(device), "choosing the device");
    check(cudaDeviceGetAttribute(&blocks_, cudaDevAttrMultiProcessorCount, device),
          "counting multiprocessors");
  }

  template <typename... Args>
  void operator()(void (*kernel)(Args...), std::size_t shared, int threads, Args... args) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "asking for shared memory");
    kernel<<<blocks_, threads, shared, stream_>>>(args...);
    check(cudaGetLastError(), "launching the kernel");
  }

 private:
  cudaStream_t stream_;
  int blocks_ = 0;
};

}  // namespace r1kern::hopper
