"""Triton kernels on a CPU: a module of kernels run in Triton's interpreter, mended.

Unmended, the interpreter computes with bfloat16's raw bits as if they were integers, truncates
float32 to bfloat16, loses the carry when it rounds to float8, rounds twice in a fused multiply-add
(before Triton 3.9), and needs TRITON_INTERPRET set before the process first imports Triton.
"""

import importlib.util
import inspect
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
# What is replaced, and the parameters it had when this was written (Triton 3.6 to 3.9).
PATCHED = [
    (interpreter, "_convert_float", "input input_dtype output_dtype rounding_mode"),
    (InterpreterBuilder, "cast_impl", "self src dst_type"),
    (InterpreterBuilder, "unary_op", "self arg op"),
    (InterpreterBuilder, "binary_op", "self lhs rhs op"),
    (InterpreterBuilder, "ternary_op", "self lhs rhs other op"),
    (InterpreterBuilder, "create_fma", "self x y z"),
    (InterpreterBuilder, "create_dot", "self a b d input_precision max_num_imprecise_acc"),
    (ReduceScanOpInterface, "apply", "self input"),
    (InterpretedFunction, "run", "self args grid warmup kwargs"),
    (InterpretedFunction, "__call__", "self args kwargs"),
    (JITFunction, "__call__", "self args kwargs"),
]
PLAIN = {(owner, name): getattr(owner, name) for owner, name, _ in PATCHED}


@contextmanager
def interpreted(module_name, mend=True):
    """A fresh copy of `r1kern.kernels.<module_name>` whose kernels run in the interpreter.

    They take CPU tensors, inside the `with` block only.  Modules imported elsewhere stay compiled.
    `mend=False` leaves the interpreter's numbers as they come.

    Raises:
        AssertionError: this Triton's interpreter is not the one the mends were written for.
    """
    name = module_name if "." in module_name else f"r1kern.kernels.{module_name}"
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for owner, attribute, parameters in PATCHED:
            found = " ".join(inspect.signature(PLAIN[owner, attribute]).parameters)
            assert found == parameters, f"{attribute} of Triton {triton.__version__} takes {found}"
            if mend or owner in (InterpretedFunction, JITFunction):
                patch.setattr(owner, attribute, MENDED[attribute])
        with pytest.MonkeyPatch.context() as importing, triton.knobs.runtime.scope():
            importing.setitem(sys.modules, name, module)
            triton.knobs.runtime.interpret = True
            spec.loader.exec_module(module)
        yield module


def _run(self, *args, **kwargs):
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        return PLAIN[InterpretedFunction, "run"](self, *args, **kwargs)


def _call(self, *args, **kwargs):
    """A kernel's call of another function, those of `triton.language` included: they were compiled
    ones when Triton was imported."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _convert_float(input, input_dtype, output_dtype, rounding_mode):
    to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if not (to_nearest and input_dtype in TORCH and output_dtype in TORCH):
        plain = PLAIN[interpreter, "_convert_float"]
        return plain(input, input_dtype, output_dtype, rounding_mode)
    bits = np.ascontiguousarray(input).view(f"i{input_dtype.primitive_bitwidth // 8}")
    x = torch.from_numpy(bits.copy()).view(TORCH[input_dtype])
    to = TORCH[output_dtype]
    if to.itemsize == 1:  # the hardware's conversion saturates
        x = x.float().clamp(torch.finfo(to).min, torch.finfo(to).max)
    width = output_dtype.primitive_bitwidth // 8
    out = x.to(to).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    return out.numpy().view(f"u{width}").reshape(input.shape)


def _bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    """The handle, or its float32 when it holds bfloat16."""
    if not _bf16(handle):
        return handle
    bits = _convert_float(handle.data, tl.bfloat16, tl.float32, None)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(handle):
    """bfloat16 of a float32 result; a comparison's result stays."""
    if handle.data.dtype == np.bool_:
        return handle
    bits = _convert_float(handle.data.astype(np.float32), tl.float32, tl.bfloat16, None)
    return TensorHandle(bits, tl.bfloat16)


def _mended(name):
    """The builder's operation `name`, with bfloat16 operands computed in float32."""

    def operation(self, *args):
        plain = PLAIN[InterpreterBuilder, name]
        handles = [x for x in args if isinstance(x, TensorHandle)]
        result = plain(self, *(_wide(x) if isinstance(x, TensorHandle) else x for x in args))
        return _narrow(result) if _bf16(handles[-1]) else result

    return operation


def _cast_impl(self, src, dst_type):
    plain = PLAIN[InterpreterBuilder, "cast_impl"]
    if dst_type.scalar != tl.bfloat16:
        return plain(self, _wide(src), dst_type)
    return _narrow(plain(self, _wide(src), tl.float32))


def _create_fma(self, x, y, z):
    if z.dtype.scalar != tl.float32:
        return _mended("create_fma")(self, x, y, z)
    # A product of two float32 has 48 bits: exact in the 64 of x86's long double.
    wide = np.longdouble
    exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return TensorHandle(exact.astype(np.float32), tl.float32)


def _apply(self, input):
    tensors = input if isinstance(input, tuple) else (input,)
    assert not any(_bf16(x) for x in tensors), "widen bfloat16 before a reduction or a scan"
    return PLAIN[ReduceScanOpInterface, "apply"](self, input)


MENDED = {
    "_convert_float": _convert_float,
    "cast_impl": _cast_impl,
    "apply": _apply,
    "create_fma": _create_fma,
    "run": _run,
    "__call__": _call,
    **{name: _mended(name) for name in ("unary_op", "binary_op", "ternary_op", "create_dot")},
}
