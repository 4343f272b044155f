#pragma once

#include <cstdint>

// Blockwise FP8 in bits: e4m3 codes and float32 scales as kernels/fp8_reference.py defines them
// (layouts and legend there).  Pointers to what is not wanted are null.

namespace r1kern {

struct BFloat16 {
  std::uint16_t bits;
};

// R rows of K columns by E experts: offsets [E + 1], first row of each, and R.
struct Fp8Rows {
  std::int64_t R, K, E;
  const std::int64_t* offsets;
  bool power_of_two;
};

// P, enough rows for every expert's, padded to a multiple of 128.
std::int64_t fp8_padded_rows(std::int64_t R, std::int64_t E);

struct Fp8Out {
  std::uint8_t* row_codes;  // [R, K]
  float* row_scales;        // [KB, R], `row_scale_stride` from line to line
  std::int64_t row_scale_stride;
  std::uint8_t* column_codes;  // [K, P]
  float* column_scales;        // [P / 128, K]
};

// Real is float or BFloat16 in all that follows; arithmetic is float.

// x [R, K].
template <typename Real>
void fp8_quantize(const Real* x, const Fp8Rows& shape, const Fp8Out& out, int threads);

// silu(gate) * up * prob of h [R, 2K] (gate, up) and probs [R].
template <typename Real>
void fp8_swiglu(const Real* h, const float* probs, const Fp8Rows& shape, const Fp8Out& out,
                int threads);

// Gradients of it: of h [R, K], where grad is [R, K / 2], quantised; of probs [R].
template <typename Real>
void fp8_swiglu_backward(const Real* grad, const Real* h, const float* probs, const Fp8Rows& shape,
                         const Fp8Out& out, float* grad_probs, int threads);

// w [N, K] -> codes [N, K], codes_t [K, N], scales [parts * ceil(N / parts / 128), KB].
template <typename Real>
void fp8_quantize_weight(const Real* w, std::int64_t N, std::int64_t K, std::int64_t parts,
                         bool power_of_two, std::uint8_t* codes, std::uint8_t* codes_t,
                         float* scales, int threads);

// Codes [N, K], `stride` from row to row, times the scale of their block of `height` x 128.
struct Fp8Blocks {
  std::int64_t N, K, stride, height;
  std::int64_t row_parts, column_parts;       // in which blocks start anew
  std::int64_t scale_stride0, scale_stride1;  // from block to block, down and along
};

void fp8_dequantize(const std::uint8_t* codes, const float* scales, const Fp8Blocks& blocks,
                    float* out, int threads);

}  // namespace r1kern
