// Python bindings of r1kern._C: conversion only, no logic.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "packing.h"

namespace py = pybind11;

namespace {

// Without py::array::forcecast: an integer array converts, a float array is a TypeError.
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

Int64Array pack_ffd(const Int64Array& lengths, std::int64_t budget) {
  if (lengths.ndim() != 1) throw py::value_error("lengths must have one dimension");
  const std::vector<std::int64_t> bins =
      r1kern::pack_ffd(lengths.data(), static_cast<std::size_t>(lengths.size()), budget);
  return Int64Array(static_cast<py::ssize_t>(bins.size()), bins.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ parts of r1kern (sources in csrc/).";
  m.def("pack_ffd", &pack_ffd, py::arg("lengths"), py::arg("budget"),
        "First-fit-decreasing bin packing.\n\n"
        "lengths: integer array [N], tokens of each sequence; budget: tokens that fit a bin.\n"
        "Returns int64 [N], the bin of each sequence, bins numbered from 0 in the order they are\n"
        "opened.  Deterministic: longest first, ties by index.\n"
        "Raises ValueError where budget < 1, or a length is negative or above the budget.");
}
