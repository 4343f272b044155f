// The Hopper kernels as the binding calls them: arguments only, no CUDA header.
//
// Addresses are device addresses, of contiguous tensors but for the strides, in elements.  A call
// only enqueues; what fails in it throws CudaError, one line.  Nothing needs a driver before the
// first call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace r1kern::hopper {

using Int = std::int64_t;
using Address = std::uintptr_t;

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Gemm {
  int device;
  Address stream;
  Address a, a_scales, b, b_scales, offsets, out;
  Int R, N, K, E;
  Int a_scales_stride, b_scales_expert_stride, b_scales_block_stride, b_scales_depth_stride;
  bool out_is_float;
};
void grouped_gemm(const Gemm& x);
std::size_t grouped_gemm_shared_memory();  // bytes a block

struct Wgrad {
  int device;
  Address stream;
  Address a_t, a_scales, b_t, b_scales, offsets, grads;
  Int P, N, K, E;
};
void grouped_wgrad(const Wgrad& x);
std::size_t grouped_wgrad_shared_memory();

int cuda_version();  // of the toolkit that compiled this: 13000 for 13.0

}  // namespace r1kern::hopper
