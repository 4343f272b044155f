#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One build for every x86-64: the loader picks the widest version the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define R1KERN_CLONES \
  __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define R1KERN_CLONES
#endif
#define R1KERN_INLINE inline __attribute__((always_inline))

namespace r1kern {

R1KERN_INLINE float power_of_two(std::int32_t n) {
  const std::int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) for x <= 88, within 2 units in the last place (denormals included), in straight-line code
// that vectorises.  NaN stays NaN.
R1KERN_INLINE float fast_exp(float x) {
  x = x < -105.0f ? -105.0f : x;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504088896341f + round) - round;
  // ln 2 in two parts: n times the first is exact.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: below n = -126 one alone is no normal number.
  const std::int32_t whole = static_cast<std::int32_t>(n), half = whole / 2;
  return p * power_of_two(half) * power_of_two(whole - half);
}

R1KERN_INLINE double fast_exp(double x) { return std::exp(x); }

}  // namespace r1kern
