# Built only where there is nvcc.  Tensors are device addresses, strides count elements
# (csrc/hopper has the shapes); what fails raises RuntimeError, one line.

CUDA_VERSION: int
SHARED_MEMORY: dict[str, int]

def grouped_gemm(
    *,
    device: int,
    stream: int,
    a: int,
    a_scales: int,
    b: int,
    b_scales: int,
    offsets: int,
    out: int,
    R: int,
    N: int,
    K: int,
    E: int,
    a_scales_stride: int,
    b_scales_expert_stride: int,
    b_scales_block_stride: int,
    b_scales_depth_stride: int,
    out_is_float: bool,
) -> None: ...
def grouped_wgrad(
    *,
    device: int,
    stream: int,
    a_t: int,
    a_scales: int,
    b_t: int,
    b_scales: int,
    offsets: int,
    grads: int,
    P: int,
    N: int,
    K: int,
    E: int,
) -> None: ...
