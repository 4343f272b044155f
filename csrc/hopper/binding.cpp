// Python bindings of r1kern._hopper: conversion only; kernels/fp8_gemm_hopper.py has checked all.

#include <pybind11/pybind11.h>

#include "launch.h"

namespace py = pybind11;
using namespace r1kern::hopper;

PYBIND11_MODULE(_hopper, m) {
  m.doc() = "FP8 grouped products on Hopper; see csrc/hopper.";
  m.attr("CUDA_VERSION") = cuda_version();
  m.attr("SHARED_MEMORY") = py::dict(py::arg("grouped_gemm") = grouped_gemm_shared_memory(),
                                     py::arg("grouped_wgrad") = grouped_wgrad_shared_memory());

  m.def(
      "grouped_gemm",
      [](int device, Address stream, Address a, Address a_scales, Address b, Address b_scales,
         Address offsets, Address out, Int R, Int N, Int K, Int E,
         Int a_scales_stride, Int b_scales_expert_stride, Int b_scales_block_stride,
         Int b_scales_depth_stride, bool out_is_float) {
        grouped_gemm({device, stream, a, a_scales, b, b_scales, offsets, out, R, N, K, E,
                      a_scales_stride, b_scales_expert_stride, b_scales_block_stride,
                      b_scales_depth_stride, out_is_float});
      },
      py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("a"), py::arg("a_scales"),
      py::arg("b"), py::arg("b_scales"), py::arg("offsets"), py::arg("out"), py::arg("R"),
      py::arg("N"), py::arg("K"), py::arg("E"), py::arg("a_scales_stride"),
      py::arg("b_scales_expert_stride"), py::arg("b_scales_block_stride"),
      py::arg("b_scales_depth_stride"), py::arg("out_is_float"));

  m.def(
      "grouped_wgrad",
      [](int device, Address stream, Address a_t, Address a_scales, Address b_t, Address b_scales,
         Address offsets, Address grads, Int P, Int N, Int K, Int E) {
        grouped_wgrad(
            {device, stream, a_t, a_scales, b_t, b_scales, offsets, grads, P, N, K, E});
      },
      py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("a_t"), py::arg("a_scales"),
      py::arg("b_t"), py::arg("b_scales"), py::arg("offsets"), py::arg("grads"), py::arg("P"),
      py::arg("N"), py::arg("K"), py::arg("E"));
}
