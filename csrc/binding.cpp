// Python bindings of r1kern._C: conversion only, no logic.
//
// Tensors come as addresses (data_ptr()) of contiguous memory with their sizes; `itemsize` is 4
// (float32) or 8 (float64), for FP8 2 (bfloat16) or 4.  The callers in kernels/ have checked shapes, dtypes and devices.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "fp8.h"
#include "head.h"
#include "packing.h"
#include "pages.h"
#include "permute.h"
#include "route.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;
// Without py::array::forcecast: an integer array converts, a float array is a TypeError.
using Int64Array = py::array_t<Int, py::array::c_style>;
using DoubleArray = py::array_t<double, py::array::c_style>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run` with a value of the type that has `itemsize` bytes.
template <typename Run>
void with_real(Int itemsize, Run run) {
  if (itemsize == 4) return run(float());
  if (itemsize == 8) return run(double());
  throw py::value_error("itemsize must be 4 or 8, got " + std::to_string(itemsize));
}

Int64Array pack_ffd(const Int64Array& lengths, Int budget) {
  if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
  const std::vector<Int> bins =
      r1kern::pack_ffd(lengths.data(), static_cast<std::size_t>(lengths.size()), budget);
  return Int64Array(static_cast<py::ssize_t>(bins.size()), bins.data());
}

Int64Array pack_even(const Int64Array& lengths, const DoubleArray& costs, Int budget, Int bins) {
  if (lengths.ndim() != 1 || costs.ndim() != 1 || lengths.size() != costs.size()) {
    throw py::value_error("lengths and costs must have one dimension and the same size");
  }
  const std::vector<Int> chosen =
      r1kern::pack_even(lengths.data(), costs.data(), static_cast<std::size_t>(lengths.size()),
                        budget, static_cast<std::size_t>(bins));
  return Int64Array(static_cast<py::ssize_t>(chosen.size()), chosen.data());
}

void logits_stats(Int itemsize, Address z, Int n, Int V, Int stride, Address columns,
                  Address stats, int threads) {
  with_real(itemsize, [&](auto real) {
    using Real = decltype(real);
    r1kern::logits_stats(at<const Real>(z), n, V, stride, at<const Int>(columns), at<Real>(stats),
                         threads);
  });
}

void dlogits(Int itemsize, Address z, Int V, Int stride, Address live, Int m, Address columns,
             Address shift, Address c0, Address c1, Address g, int threads) {
  with_real(itemsize, [&](auto real) {
    using Real = decltype(real);
    r1kern::dlogits(at<Real>(z), V, stride, at<const Int>(live), m, at<const Int>(columns),
                    at<const Real>(shift), at<const Real>(c0), at<const Real>(c1),
                    at<const Real>(g), threads);
  });
}

void route(Int itemsize, Address logits, Address bias, Int T, Int E, Int groups, Int topk_groups,
           Int K, Int R, Int align, double scale, bool normalize, Address weights, Address indices,
           Address counts, Address offsets, Address slots, Address order, Address score_sums,
           int threads) {
  const r1kern::RouteShape shape{T, E, groups, topk_groups, K, R, align, scale, normalize};
  with_real(itemsize, [&](auto real) {
    using Real = decltype(real);
    const r1kern::RouteOut<Real> out{at<Real>(weights),       at<Int>(indices),
                                     at<Int>(counts),         at<Int>(offsets),
                                     at<std::int32_t>(slots), at<std::int32_t>(order),
                                     at<Real>(score_sums)};
    r1kern::route(at<const Real>(logits), at<const Real>(bias), shape, out, threads);
  });
}

void permute(Address x, Address order, Int R, Int K, Int bytes, Address rows, int threads) {
  r1kern::permute(at<const char>(x), at<const std::int32_t>(order), R, K, bytes, at<char>(rows),
                  threads);
}

void unpermute(Int itemsize, Address rows, Address slots, Address weights, Int T, Int K, Int H,
               Address y, int threads) {
  with_real(itemsize, [&](auto real) {
    using Real = decltype(real);
    r1kern::unpermute(at<const Real>(rows), at<const std::int32_t>(slots), at<const Real>(weights),
                      T, K, H, at<Real>(y), threads);
  });
}

void unpermute_backward(Int itemsize, Address grad, Address rows, Address slots, Address weights,
                        Int T, Int K, Int H, Address grad_rows, Address grad_weights,
                        int threads) {
  with_real(itemsize, [&](auto real) {
    using Real = decltype(real);
    r1kern::unpermute_backward(at<const Real>(grad), at<const Real>(rows),
                               at<const std::int32_t>(slots), at<const Real>(weights), T, K, H,
                               at<Real>(grad_rows), at<Real>(grad_weights), threads);
  });
}

// Calls `run` with a value of the type, float32 or bfloat16, that has `itemsize` bytes.
template <typename Run>
void with_narrow(Int itemsize, Run run) {
  if (itemsize == 2) return run(r1kern::BFloat16());
  if (itemsize == 4) return run(float());
  throw py::value_error("itemsize must be 2 or 4, got " + std::to_string(itemsize));
}

r1kern::Fp8Out fp8_out(Address row_codes, Address row_scales, Int row_scale_stride,
                       Address column_codes, Address column_scales) {
  return {at<std::uint8_t>(row_codes), at<float>(row_scales), row_scale_stride,
          at<std::uint8_t>(column_codes), at<float>(column_scales)};
}

void fp8_quantize(Int itemsize, Address x, Int R, Int K, Address offsets, Int E, bool power_of_two,
                  Address row_codes, Address row_scales, Int row_scale_stride,
                  Address column_codes, Address column_scales, int threads) {
  const r1kern::Fp8Rows shape{R, K, E, at<const Int>(offsets), power_of_two};
  const auto out = fp8_out(row_codes, row_scales, row_scale_stride, column_codes, column_scales);
  with_narrow(itemsize, [&](auto real) {
    r1kern::fp8_quantize(at<const decltype(real)>(x), shape, out, threads);
  });
}

void fp8_swiglu(Int itemsize, Address h, Address probs, Int R, Int K, Address offsets, Int E,
                bool power_of_two, Address row_codes, Address row_scales, Int row_scale_stride,
                Address column_codes, Address column_scales, int threads) {
  const r1kern::Fp8Rows shape{R, K, E, at<const Int>(offsets), power_of_two};
  const auto out = fp8_out(row_codes, row_scales, row_scale_stride, column_codes, column_scales);
  with_narrow(itemsize, [&](auto real) {
    r1kern::fp8_swiglu(at<const decltype(real)>(h), at<const float>(probs), shape, out, threads);
  });
}

void fp8_swiglu_backward(Int itemsize, Address grad, Address h, Address probs, Int R, Int K,
                         Address offsets, Int E, bool power_of_two, Address row_codes,
                         Address row_scales, Int row_scale_stride, Address column_codes,
                         Address column_scales, Address grad_probs, int threads) {
  const r1kern::Fp8Rows shape{R, K, E, at<const Int>(offsets), power_of_two};
  const auto out = fp8_out(row_codes, row_scales, row_scale_stride, column_codes, column_scales);
  with_narrow(itemsize, [&](auto real) {
    using Real = decltype(real);
    r1kern::fp8_swiglu_backward(at<const Real>(grad), at<const Real>(h), at<const float>(probs),
                                shape, out, at<float>(grad_probs), threads);
  });
}

void fp8_quantize_weight(Int itemsize, Address w, Int N, Int K, Int parts, bool power_of_two,
                         Address codes, Address codes_t, Address scales, int threads) {
  with_narrow(itemsize, [&](auto real) {
    r1kern::fp8_quantize_weight(at<const decltype(real)>(w), N, K, parts, power_of_two,
                                at<std::uint8_t>(codes), at<std::uint8_t>(codes_t),
                                at<float>(scales), threads);
  });
}

void fp8_dequantize(Address codes, Address scales, Int N, Int K, Int stride, Int height,
                    Int row_parts, Int column_parts, Int scale_stride0, Int scale_stride1,
                    Address out, int threads) {
  const r1kern::Fp8Blocks blocks{N,         K,            stride,        height,
                                 row_parts, column_parts, scale_stride0, scale_stride1};
  r1kern::fp8_dequantize(at<const std::uint8_t>(codes), at<const float>(scales), blocks,
                         at<float>(out), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ parts of r1kern (sources in csrc/, each function described in its header).";
  m.def("pack_ffd", &pack_ffd, py::arg("lengths"), py::arg("budget"),
        "First-fit-decreasing bin packing.\n\n"
        "lengths: integer array [N], tokens of each sequence; budget: tokens that fit a bin.\n"
        "Returns int64 [N], the bin of each sequence, bins numbered from 0 in the order they are\n"
        "opened.  Deterministic: longest first, ties by index.\n"
        "Raises ValueError where budget < 1, or a length is negative or above the budget.");
  m.def("pack_even", &pack_even, py::arg("lengths"), py::arg("costs"), py::arg("budget"),
        py::arg("bins"),
        "Bins of even cost: dearest first, ties by index, each into the cheapest with room.\n\n"
        "lengths, budget: as in `pack_ffd`; costs: float64 [N]; bins: how many.\n"
        "Returns int64 [N], the bin of each sequence; nothing where one finds no room.\n"
        "Raises ValueError as `pack_ffd` does.");
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("logits_stats", &logits_stats, unlocked, "head.h");
  m.def("dlogits", &dlogits, unlocked, "head.h");
  m.def(
      "prefer_huge_pages",
      [](Address start, std::size_t bytes) { r1kern::prefer_huge_pages(at<void>(start), bytes); },
      "pages.h");
  m.def("route", &route, unlocked, "route.h");
  m.def("permute", &permute, unlocked, "permute.h");
  m.def("unpermute", &unpermute, unlocked, "permute.h");
  m.def("unpermute_backward", &unpermute_backward, unlocked, "permute.h");
  m.def("fp8_quantize", &fp8_quantize, unlocked, "fp8.h");
  m.def("fp8_swiglu", &fp8_swiglu, unlocked, "fp8.h");
  m.def("fp8_swiglu_backward", &fp8_swiglu_backward, unlocked, "fp8.h");
  m.def("fp8_quantize_weight", &fp8_quantize_weight, unlocked, "fp8.h");
  m.def("fp8_dequantize", &fp8_dequantize, unlocked, "fp8.h");
}
