// The part of the CUDA runtime and language that csrc/hopper names, on the host.
#pragma once

#include <cuda.h>

#include <cstring>

#include "machine.h"

#define CUDART_VERSION 0
#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads, blocks)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

inline float __ldg(const float* from) { return *from; }
inline void __trap() { host::require(false, "trap"); }
inline void __syncwarp() { host::machine.meet(32, "__syncwarp"); }
inline void __syncthreads() { host::machine.meet(host::machine.threads(), "__syncthreads"); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return static_cast<T>(host::machine.shuffle(static_cast<std::uint32_t>(value), lane));
}
template <typename T>
T __shfl_up_sync(unsigned all, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(all, value, lane < distance ? lane : lane - distance);
}
template <typename T>
T __shfl_xor_sync(unsigned all, T value, int bits) {
  return __shfl_sync(all, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(host::setting("HOST_BLOCKS", 3));
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  host::require(!std::strcmp(name, "cuTensorMapEncodeTiled"), name);
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The most that a block of an H100 or H200 can have.
constexpr int SHARED_MEMORY = 227 * 1024;

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= SHARED_MEMORY ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
  Index gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// One block after the other: they share nothing but what they read and add to.
template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...),
                               Given&&... given) {
  gridDim = config->gridDim;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    host::machine.run(static_cast<int>(config->blockDim.x), [&] { kernel(given...); });
  }
  return cudaSuccess;
}
