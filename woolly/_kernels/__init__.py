"""The kernels: packed matrices, attention, and the program that runs a model's operations on all threads."""

from woolly._kernels.spinning import bounded_spinning

with bounded_spinning():
    import woolly._kernels.threads  # noqa: F401 - the first to load libgomp

from woolly._kernels.attention import KV_DTYPES, KVCache, attention_f32
from woolly._kernels.dispatch import (
    BF16_LEAST_TOKENS,
    COMPUTES,
    active_isa,
    available_isas,
    bf16_unit,
    check_compute,
    compiled_isas,
    converted_formats,
    kernel_formats,
    set_isa,
    use_isa,
)
from woolly._kernels.executor import Stop
from woolly._kernels.experts import PackedExperts, pair_columns, route_experts
from woolly._kernels.generate import GENERATED_FORMATS, generate, generate_all
from woolly._kernels.matmul import PackedMatrix, activation_bytes, aligned_empty, dequantize, matmul
from woolly._kernels.program import Program, row_stride
from woolly._kernels.quantize import QUANTIZED_FORMATS, quantize_rows
from woolly._kernels.rows import (
    activation_f32,
    exp_f32,
    glu_f32,
    layernorm_f32,
    quantize_q8,
    quantize_q16,
    rmsnorm_f32,
    rope_f32,
    softcap_f32,
    softmax_f32,
)
from woolly._kernels.threads import check_threads, default_threads

__all__ = [
    "BF16_LEAST_TOKENS",
    "COMPUTES",
    "GENERATED_FORMATS",
    "KV_DTYPES",
    "QUANTIZED_FORMATS",
    "KVCache",
    "PackedExperts",
    "PackedMatrix",
    "Program",
    "Stop",
    "activation_bytes",
    "activation_f32",
    "active_isa",
    "aligned_empty",
    "attention_f32",
    "available_isas",
    "bf16_unit",
    "check_compute",
    "check_threads",
    "compiled_isas",
    "converted_formats",
    "default_threads",
    "dequantize",
    "exp_f32",
    "generate",
    "generate_all",
    "glu_f32",
    "kernel_formats",
    "layernorm_f32",
    "matmul",
    "pair_columns",
    "quantize_q8",
    "quantize_q16",
    "quantize_rows",
    "rmsnorm_f32",
    "rope_f32",
    "route_experts",
    "row_stride",
    "set_isa",
    "softcap_f32",
    "softmax_f32",
    "use_isa",
]
