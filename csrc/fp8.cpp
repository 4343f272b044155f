#include "fp8.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "pages.h"
#include "vector.h"

namespace r1kern {
namespace {

constexpr std::int64_t kBlock = 128;
constexpr std::uint32_t kInfinity = 0x7F800000;

constexpr std::int64_t blocks(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

R1KERN_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

R1KERN_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

R1KERN_INLINE float widen(float x) { return x; }
R1KERN_INLINE float widen(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

// Bits of |x|, which are ordered as the numbers are; 0 of NaN.
R1KERN_INLINE std::int32_t magnitude(float x) {
  const std::uint32_t bits = bits_of(x) & 0x7FFFFFFF;
  return static_cast<std::int32_t>(bits > kInfinity ? 0 : bits);
}

// std::max takes references, and no loop with it is vectorised.
R1KERN_INLINE std::int32_t larger(std::int32_t a, std::int32_t b) { return a > b ? a : b; }

// e4m3 of x, |x| < 464, to nearest even; NaN of NaN.
R1KERN_INLINE std::uint8_t encode(float x) {
  const std::uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF;
  const std::uint32_t normal = (size - (120u << 23) + 0x7FFFF + (size >> 20 & 1)) >> 20;
  // Below 2^-6 codes are 2^-9 apart, as floats from 2^14 on are: the sum is rounded to a code.
  const std::uint32_t subnormal = bits_of(float_of(size) + 16384.0f) - bits_of(16384.0f);
  const std::uint32_t code = size < 121u << 23 ? subnormal : normal;
  return static_cast<std::uint8_t>((size > kInfinity ? 0x7F : code) | (bits >> 24 & 0x80));
}

float decode(std::uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  if ((code & 0x7F) == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10)
                              : std::ldexp(static_cast<float>(fraction), -9);
  return code & 0x80 ? -size : size;
}

// The scale of a tile whose largest magnitude has these bits.
float scale_of(std::int32_t amax, bool power_of_two) {
  const float scale = std::max(float_of(static_cast<std::uint32_t>(amax)) / 448.0f,
                               std::numeric_limits<float>::min());
  return power_of_two ? float_of((bits_of(scale) + 0x7FFFFF) & kInfinity) : scale;
}

// ---- lines of n numbers

template <typename Real>
R1KERN_INLINE void widen_any(const Real* x, std::int64_t n, float* y) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}

R1KERN_CLONES void widen_line(const float* x, std::int64_t n, float* y) { widen_any(x, n, y); }
R1KERN_CLONES void widen_line(const BFloat16* x, std::int64_t n, float* y) { widen_any(x, n, y); }

R1KERN_CLONES std::int32_t line_amax(const float* x, std::int64_t n) {
  std::int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (std::int64_t i = 0; i < n; ++i) top = larger(top, magnitude(x[i]));
  return top;
}

R1KERN_CLONES void raise_amax(const float* x, std::int64_t n, std::int32_t* top) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) top[i] = larger(top[i], magnitude(x[i]));
}

R1KERN_CLONES void encode_line(const float* x, float scale, std::int64_t n, std::uint8_t* codes) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) codes[i] = encode(x[i] / scale);
}

R1KERN_CLONES void encode_line(const float* x, const float* scales, std::int64_t n,
                               std::uint8_t* codes) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) codes[i] = encode(x[i] / scales[i]);
}

R1KERN_CLONES void decode_line(const std::uint8_t* codes, const float* table, float scale,
                               std::int64_t n, float* x) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) x[i] = table[codes[i]] * scale;
}

// ---- SwiGLU

struct Sigmoid {
  float value, rest;  // rest is 1 - value, without cancellation
};

R1KERN_INLINE Sigmoid sigmoid(float x) {
  const float e = fast_exp(-std::fabs(x)), large = 1.0f / (1.0f + e), small = e / (1.0f + e);
  return x < 0 ? Sigmoid{small, large} : Sigmoid{large, small};
}

template <typename Real>
R1KERN_INLINE void swiglu_any(const Real* h, float prob, std::int64_t I, float* y) {
#pragma omp simd
  for (std::int64_t i = 0; i < I; ++i) {
    const float gate = widen(h[i]);
    y[i] = gate * sigmoid(gate).value * widen(h[I + i]) * prob;
  }
}

R1KERN_CLONES void swiglu_line(const float* h, float prob, std::int64_t I, float* y) {
  swiglu_any(h, prob, I, y);
}
R1KERN_CLONES void swiglu_line(const BFloat16* h, float prob, std::int64_t I, float* y) {
  swiglu_any(h, prob, I, y);
}

// The gradient of h to y, that of prob returned.
template <typename Real>
R1KERN_INLINE float swiglu_backward_any(const Real* grad, const Real* h, float prob,
                                        std::int64_t I, float* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < I; ++i) {
    const float gate = widen(h[i]), up = widen(h[I + i]), g = widen(grad[i]), scaled = g * prob;
    const Sigmoid s = sigmoid(gate);
    const float silu = gate * s.value;
    y[i] = scaled * up * (s.value + silu * s.rest);
    y[I + i] = scaled * silu;
    sum += g * silu * up;
  }
  return static_cast<float>(sum);
}

R1KERN_CLONES float swiglu_backward_line(const float* grad, const float* h, float prob,
                                         std::int64_t I, float* y) {
  return swiglu_backward_any(grad, h, prob, I, y);
}
R1KERN_CLONES float swiglu_backward_line(const BFloat16* grad, const BFloat16* h, float prob,
                                         std::int64_t I, float* y) {
  return swiglu_backward_any(grad, h, prob, I, y);
}

// ---- tiles of 128 rows

// 8 rows of 8 bytes, `stride` apart, to 8 columns, `out_stride` apart, of which `columns` are kept.
void transpose8(const std::uint8_t* in, std::int64_t stride, std::uint8_t* out,
                std::int64_t out_stride, std::int64_t columns) {
  std::uint64_t line[8];
  for (int i = 0; i < 8; ++i) std::memcpy(line + i, in + i * stride, 8);
  const auto swap = [&](int apart, int shift, std::uint64_t mask) {
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const std::uint64_t moved = (line[i] >> shift ^ line[i + apart]) & mask;
      line[i] ^= moved << shift;
      line[i + apart] ^= moved;
    }
  };
  swap(1, 8, 0x00FF00FF00FF00FF);
  swap(2, 16, 0x0000FFFF0000FFFF);
  swap(4, 32, 0x00000000FFFFFFFF);
  for (int i = 0; i < columns; ++i) std::memcpy(out + i * out_stride, line + i, 8);
}

struct Tile {
  std::int64_t start, rows;
};

// Those of each expert in turn, then empty ones, P / 128 in all.
std::vector<Tile> tiles_of(const Fp8Rows& shape) {
  std::vector<Tile> tiles;
  for (std::int64_t e = 0; e < shape.E; ++e) {
    const std::int64_t end = shape.offsets[e + 1];
    for (std::int64_t start = shape.offsets[e]; start < end; start += kBlock) {
      tiles.push_back({start, std::min(kBlock, end - start)});
    }
  }
  tiles.resize(fp8_padded_rows(shape.R, shape.E) / kBlock, {shape.R, 0});
  return tiles;
}

// What a thread holds of a tile: its numbers, and by column largest magnitudes, scales and codes.
struct Strip {
  explicit Strip(std::int64_t K)
      : width((K + 7) / 8 * 8 + 64), x(kBlock * K), amax(K), codes(kBlock * width) {}

  std::int64_t width;
  std::vector<float> x;
  std::vector<std::int32_t> amax;
  std::vector<std::uint8_t> codes;
};

void encode_rows(const Fp8Rows& shape, const Fp8Out& out, const Tile& tile, const float* x) {
  const std::int64_t K = shape.K;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    for (std::int64_t k = 0; k < K; k += kBlock) {
      const std::int64_t n = std::min(kBlock, K - k), row = tile.start + r;
      const float* line = x + r * K + k;
      const float scale = scale_of(line_amax(line, n), shape.power_of_two);
      out.row_scales[k / kBlock * out.row_scale_stride + row] = scale;
      encode_line(line, scale, n, out.row_codes + row * K + k);
    }
  }
}

void encode_columns(const Fp8Rows& shape, const Fp8Out& out, std::int64_t t, std::int64_t rows,
                    Strip& strip) {
  const std::int64_t K = shape.K, P = fp8_padded_rows(shape.R, shape.E);
  std::fill(strip.amax.begin(), strip.amax.end(), 0);
  for (std::int64_t r = 0; r < rows; ++r) raise_amax(&strip.x[r * K], K, strip.amax.data());
  float* scales = out.column_scales + t * K;
  for (std::int64_t k = 0; k < K; ++k) scales[k] = scale_of(strip.amax[k], shape.power_of_two);
  std::uint8_t* codes = strip.codes.data();
  for (std::int64_t r = 0; r < rows; ++r) {
    encode_line(&strip.x[r * K], scales, K, codes + r * strip.width);
  }
  std::memset(codes + rows * strip.width, 0, (kBlock - rows) * strip.width);
  for (std::int64_t k = 0; k < K; k += 8) {
    for (std::int64_t r = 0; r < kBlock; r += 8) {
      transpose8(codes + r * strip.width + k, strip.width,
                 out.column_codes + k * P + t * kBlock + r, P, std::min<std::int64_t>(8, K - k));
    }
  }
}

// Quantises the rows that `line(r, y)` writes to y [K], each asked for once.
template <typename Line>
void quantize_lines(const Fp8Rows& shape, const Fp8Out& out, int threads, Line line) {
  if (!shape.K) return;
  const std::vector<Tile> tiles = tiles_of(shape);
  const std::int64_t P = fp8_padded_rows(shape.R, shape.E);
  if (out.row_codes) prefer_huge_pages(out.row_codes, shape.R * shape.K);
  if (out.column_codes) prefer_huge_pages(out.column_codes, P * shape.K);
#pragma omp parallel num_threads(threads)
  {
    Strip strip(shape.K);
#pragma omp for schedule(dynamic)
    for (std::int64_t t = 0; t < static_cast<std::int64_t>(tiles.size()); ++t) {
      const Tile& tile = tiles[t];
      for (std::int64_t r = 0; r < tile.rows; ++r) line(tile.start + r, &strip.x[r * shape.K]);
      if (out.row_codes) encode_rows(shape, out, tile, strip.x.data());
      if (out.column_codes) encode_columns(shape, out, t, tile.rows, strip);
    }
  }
}

// ---- blocks of 128 x 128

template <typename Real>
struct Weight {
  const Real* w;
  std::int64_t N, K, parts;
  bool power_of_two;
  std::uint8_t *codes, *codes_t;
  float* scales;
};

// `codes` [rows, columns] within lines of `stride`, to lines of `out_stride`, transposed.
void transpose(const std::uint8_t* codes, std::int64_t stride, std::int64_t rows,
               std::int64_t columns, std::uint8_t* out, std::int64_t out_stride) {
  const std::int64_t whole_rows = rows / 8 * 8, whole = columns / 8 * 8;
  for (std::int64_t k = 0; k < whole; k += 8) {
    for (std::int64_t r = 0; r < whole_rows; r += 8) {
      transpose8(codes + r * stride + k, stride, out + k * out_stride + r, out_stride, 8);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t first = r < whole_rows ? whole : 0;
    for (std::int64_t k = first; k < columns; ++k) out[k * out_stride + r] = codes[r * stride + k];
  }
}

// The block of rows n.. and columns k.., no more than its part has.
template <typename Real>
void encode_block(const Weight<Real>& weight, std::int64_t n, std::int64_t k, std::int64_t rows,
                  float* scale, float* x) {
  const std::int64_t K = weight.K, columns = std::min(kBlock, K - k);
  std::int32_t amax = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    widen_line(weight.w + (n + r) * K + k, columns, x + r * columns);
    amax = std::max(amax, line_amax(x + r * columns, columns));
  }
  *scale = scale_of(amax, weight.power_of_two);
  std::uint8_t* codes = weight.codes + n * K + k;
  for (std::int64_t r = 0; r < rows; ++r) {
    encode_line(x + r * columns, *scale, columns, codes + r * K);
  }
  if (weight.codes_t) {
    transpose(codes, K, rows, columns, weight.codes_t + k * weight.N + n, weight.N);
  }
}

}  // namespace

std::int64_t fp8_padded_rows(std::int64_t R, std::int64_t E) {
  return (R + (kBlock - 1) * E) / kBlock * kBlock;
}

template <typename Real>
void fp8_quantize(const Real* x, const Fp8Rows& shape, const Fp8Out& out, int threads) {
  quantize_lines(shape, out, threads, [&](std::int64_t r, float* y) {
    widen_line(x + r * shape.K, shape.K, y);
  });
}

template <typename Real>
void fp8_swiglu(const Real* h, const float* probs, const Fp8Rows& shape, const Fp8Out& out,
                int threads) {
  quantize_lines(shape, out, threads, [&](std::int64_t r, float* y) {
    swiglu_line(h + r * 2 * shape.K, probs[r], shape.K, y);
  });
}

template <typename Real>
void fp8_swiglu_backward(const Real* grad, const Real* h, const float* probs, const Fp8Rows& shape,
                         const Fp8Out& out, float* grad_probs, int threads) {
  const std::int64_t I = shape.K / 2;
  quantize_lines(shape, out, threads, [&](std::int64_t r, float* y) {
    grad_probs[r] = swiglu_backward_line(grad + r * I, h + r * 2 * I, probs[r], I, y);
  });
}

template <typename Real>
void fp8_quantize_weight(const Real* w, std::int64_t N, std::int64_t K, std::int64_t parts,
                         bool power_of_two, std::uint8_t* codes, std::uint8_t* codes_t,
                         float* scales, int threads) {
  const Weight<Real> weight{w, N, K, parts, power_of_two, codes, codes_t, scales};
  const std::int64_t part_rows = N / parts, down = blocks(part_rows), along = blocks(K);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(kBlock * kBlock);
#pragma omp for schedule(static)
    for (std::int64_t b = 0; b < parts * down * along; ++b) {
      const std::int64_t row = b / along, part = row / down, first = row % down * kBlock;
      encode_block(weight, part * part_rows + first, b % along * kBlock,
                   std::min(kBlock, part_rows - first), scales + b, x.data());
    }
  }
}

void fp8_dequantize(const std::uint8_t* codes, const float* scales, const Fp8Blocks& shape,
                    float* out, int threads) {
  std::array<float, 256> table;
  for (int code = 0; code < 256; ++code) table[code] = decode(static_cast<std::uint8_t>(code));
  const std::int64_t N = shape.N, K = shape.K;
  const std::int64_t row_part = N / shape.row_parts, column_part = K / shape.column_parts;
  const std::int64_t down = (row_part + shape.height - 1) / shape.height;
  prefer_huge_pages(out, N * K * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t row = n / row_part * down + n % row_part / shape.height;
    const float* scale = scales + row * shape.scale_stride0;
    for (std::int64_t k = 0, end; k < K; k = end, scale += shape.scale_stride1) {
      end = std::min(k + kBlock, (k / column_part + 1) * column_part);
      decode_line(codes + n * shape.stride + k, table.data(), *scale, end - k, out + n * K + k);
    }
  }
}

#define R1KERN_FP8(Real)                                                                         \
  template void fp8_quantize(const Real*, const Fp8Rows&, const Fp8Out&, int);                   \
  template void fp8_swiglu(const Real*, const float*, const Fp8Rows&, const Fp8Out&, int);       \
  template void fp8_swiglu_backward(const Real*, const Real*, const float*, const Fp8Rows&,      \
                                    const Fp8Out&, float*, int);                                 \
  template void fp8_quantize_weight(const Real*, std::int64_t, std::int64_t, std::int64_t, bool, \
                                    std::uint8_t*, std::uint8_t*, float*, int);
R1KERN_FP8(float)
R1KERN_FP8(BFloat16)
#undef R1KERN_FP8

}  // namespace r1kern
