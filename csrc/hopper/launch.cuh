// Tensor maps and launches, for the files that hold kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "launch.h"

namespace r1kern::hopper {

// Throws, naming what was tried, unless it went well.
void check(cudaError_t error, const char* what);

// Contiguous 1-byte elements, sizes innermost first, in boxes of `rows` x 128, swizzled by 128 bytes.
CUtensorMap bytes_map(Address address, std::initializer_list<Int> sizes, int rows);

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
    cudaLaunchConfig_t config = {};
    config.gridDim.x = static_cast<unsigned>(blocks_);
    config.blockDim.x = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launching the kernel");
  }

 private:
  cudaStream_t stream_;
  int blocks_ = 0;
};

}  // namespace r1kern::hopper
