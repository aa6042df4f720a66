"""Kernels that work along rows: norms, activations, soft caps, softmax, exp, RoPE, activation quantisation."""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint8_t

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport (
    WOOLLY_ACT_GELU_TANH, WOOLLY_ACT_SILU, WOOLLY_ACT_SWIGLU_CLAMPED, WOOLLY_QBLOCK, WOOLLY_ROPE_NEOX,
    WOOLLY_ROPE_NORM, woolly_kernels, woolly_q16_scales, woolly_q16_stride, woolly_quantize_fn,
)

from woolly._kernels.matmul import check_out
from woolly._kernels.threads import check_threads

ACTIVATIONS = {"silu": WOOLLY_ACT_SILU, "gelu_tanh": WOOLLY_ACT_GELU_TANH}
GATED_ACTIVATIONS = {**ACTIVATIONS, "swiglu_clamped": WOOLLY_ACT_SWIGLU_CLAMPED}
ROPE_PAIRINGS = {"norm": WOOLLY_ROPE_NORM, "neox": WOOLLY_ROPE_NEOX}


def rmsnorm_f32(const float[:, ::1] x not None, const float[::1] weight not None, /, *, eps, out=None, n_threads=None):
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
    weight : float32, (n,)
    eps : float
    out : float32, (n_tokens, n), optional
        May be x's own array.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)

    Raises
    ------
    ValueError
        Shapes do not fit.

    Notes
    -----
    The sum of squares runs over 16 float32 lanes and a fixed tree. Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"rmsnorm_f32: x has {x.shape[1]} columns, weight has {weight.shape[0]}")
    out = check_out(out, (x.shape[0], x.shape[1]), "rmsnorm_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = x.shape[1]
    cdef float epsilon = eps
    cdef int threads = check_threads(n_threads)
    if n:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            kernels.rmsnorm(&x[t, 0], &weight[0], n, epsilon, &y[t, 0])
    return out


def layernorm_f32(const float[:, ::1] x not None, const float[::1] weight not None, const float[::1] bias not None, /,
                  *, eps, out=None, n_threads=None):
    """out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, row by row.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
    weight, bias : float32, (n,)
    eps : float
    out : float32, (n_tokens, n), optional
        May be x's own array.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)

    Raises
    ------
    ValueError
        Shapes do not fit.

    Notes
    -----
    Both sums run over 16 float32 lanes and a fixed tree. Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    if weight.shape[0] != x.shape[1] or bias.shape[0] != x.shape[1]:
        raise ValueError(f"layernorm_f32: x has {x.shape[1]} columns, weight has {weight.shape[0]}, "
                         f"bias has {bias.shape[0]}")
    out = check_out(out, (x.shape[0], x.shape[1]), "layernorm_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = x.shape[1]
    cdef float epsilon = eps
    cdef int threads = check_threads(n_threads)
    if n:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            kernels.layernorm(&x[t, 0], &weight[0], &bias[0], n, epsilon, &y[t, 0])
    return out


def activation_f32(const float[:, ::1] x not None, /, *, activation, out=None, n_threads=None):
    """out = activation(x), without a gate.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
    activation : {"silu", "gelu_tanh"}
        As in `glu_f32`.
    out : float32, (n_tokens, n), optional
        May be x's own array.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)

    Raises
    ------
    ValueError
        The activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_f32: unknown activation {activation!r}, known: {', '.join(ACTIVATIONS)}")
    out = check_out(out, (x.shape[0], x.shape[1]), "activation_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = x.shape[1]
    cdef int act = ACTIVATIONS[activation], threads = check_threads(n_threads)
    if n:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            kernels.act(act, &x[t, 0], n, &y[t, 0])
    return out


def softcap_f32(const float[:, ::1] x not None, /, *, cap, out=None, n_threads=None):
    """out = cap tanh(x / cap): values bent into (-cap, cap).

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
    cap : float
        Above zero.
    out : float32, (n_tokens, n), optional
        May be x's own array.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)

    Raises
    ------
    ValueError
        cap is not above zero.

    Notes
    -----
    Computed as 2 cap / (1 + exp(-2 x / cap)) - cap: the error is relative to cap, not to the result. Gemma Team 2024,
    arXiv:2408.00118.
    """
    if not cap > 0:
        raise ValueError(f"softcap_f32: cap must be above zero, got {cap}")
    out = check_out(out, (x.shape[0], x.shape[1]), "softcap_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = x.shape[1]
    cdef float limit = cap
    cdef int threads = check_threads(n_threads)
    if n:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            kernels.softcap(&x[t, 0], limit, n, &y[t, 0])
    return out


def glu_f32(const float[:, ::1] gate not None, const float[:, ::1] up not None, /, *, activation, out=None,
            n_threads=None):
    """out = activation(gate) * up: SwiGLU with "silu", GeGLU with "gelu_tanh", gpt-oss's with "swiglu_clamped".

    Parameters
    ----------
    gate, up : float32, (n_tokens, n), C-contiguous
    activation : {"silu", "gelu_tanh", "swiglu_clamped"}
    out : float32, (n_tokens, n), optional
        May be gate's own array.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)

    Raises
    ------
    ValueError
        Shapes differ or the activation is unknown.

    Notes
    -----
    Shazeer 2020, arXiv:2002.05202. The tanh form of GELU is x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    "swiglu_clamped" is g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = min(max(up, -7), 7): OpenAI 2025,
    arXiv:2508.10925.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"glu_f32: unknown activation {activation!r}, known: {', '.join(GATED_ACTIVATIONS)}")
    if gate.shape[0] != up.shape[0] or gate.shape[1] != up.shape[1]:
        raise ValueError(f"glu_f32: gate is ({gate.shape[0]}, {gate.shape[1]}), up is ({up.shape[0]}, {up.shape[1]})")
    out = check_out(out, (gate.shape[0], gate.shape[1]), "glu_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = gate.shape[1]
    cdef int act = GATED_ACTIVATIONS[activation], threads = check_threads(n_threads)
    if n:
        for t in prange(gate.shape[0], nogil=True, num_threads=threads):
            kernels.glu(act, &gate[t, 0], &up[t, 0], n, &y[t, 0])
    return out


def exp_f32(const float[::1] x not None, /):
    """exp(x), the polynomial that softmax and the activations use: within 3 ulp, 0 below -87.3.

    Parameters
    ----------
    x : float32, (n,)

    Returns
    -------
    float32, (n,)
    """
    out = np.empty(x.shape[0], dtype=np.float32)
    cdef float[::1] y = out
    if x.shape[0]:
        with nogil:
            active().exp(&x[0], x.shape[0], &y[0])
    return out


def softmax_f32(const float[:, ::1] x not None, /, *, out=None, n_threads=None):
    """out = exp(x - max x) / sum exp(x - max x), row by row.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
    out : float32, (n_tokens, n), optional
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n)
    """
    out = check_out(out, (x.shape[0], x.shape[1]), "softmax_f32")
    cdef float[:, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, n = x.shape[1]
    cdef int threads = check_threads(n_threads)
    if n:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            kernels.softmax(&x[t, 0], n, &y[t, 0])
    return out


def rope_f32(const float[:, :, ::1] x not None, const float[:, ::1] cos not None, const float[:, ::1] sin not None, /,
             *, pairing, n_threads=None):
    """Rotate the first n_rot dimensions of each head: (a, b) -> (a cos - b sin, b cos + a sin).

    Parameters
    ----------
    x : float32, (n_tokens, n_heads, head_dim), C-contiguous
    cos, sin : float32, (n_tokens, n_rot / 2)
        Of each token's position.
    pairing : {"norm", "neox"}
        Pairs are (2 i, 2 i + 1) or (i, i + n_rot / 2).
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n_heads, head_dim)

    Raises
    ------
    ValueError
        Shapes do not fit or the pairing is unknown.

    Notes
    -----
    Su et al. 2021, arXiv:2104.09864.
    """
    if pairing not in ROPE_PAIRINGS:
        raise ValueError(f"rope_f32: unknown pairing {pairing!r}, known: {', '.join(ROPE_PAIRINGS)}")
    if (cos.shape[0], cos.shape[1]) != (sin.shape[0], sin.shape[1]) or cos.shape[0] != x.shape[0]:
        raise ValueError(f"rope_f32: x has {x.shape[0]} tokens, cos is ({cos.shape[0]}, {cos.shape[1]}), "
                         f"sin is ({sin.shape[0]}, {sin.shape[1]})")
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"rope_f32: {2 * cos.shape[1]} dimensions to rotate, heads have {x.shape[2]}")
    out = np.array(x, dtype=np.float32, order="C")
    cdef float[:, :, ::1] y = out
    cdef const woolly_kernels *kernels = active()
    cdef int64_t t, head, n_rot = 2 * cos.shape[1], n_heads = x.shape[1]
    cdef int pairs = ROPE_PAIRINGS[pairing], threads = check_threads(n_threads)
    if n_rot and n_heads:
        for t in prange(x.shape[0], nogil=True, num_threads=threads):
            for head in range(n_heads):
                kernels.rope(pairs, &y[t, head, 0], n_rot, &cos[t, 0], &sin[t, 0])
    return out


def quantize_q16(const float[:, ::1] x not None, /):
    """Quantise activations to 16 bits per 32 values: q = 256 hi + lo = round(x / d).

    d is the least power of two that keeps |q| within 32639, so that products with it are exact.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous, n a multiple of 32

    Returns
    -------
    q : int32, (n_tokens, n)
    d : float32, (n_tokens, n / 32)

    Raises
    ------
    ValueError
        n is not a multiple of 32.

    Notes
    -----
    Rounds half to even; the lower digit is never -128, such a q is one more. A block whose maximum is below 1e-32
    becomes zero; one that holds a NaN or a magnitude of 2^100 or more gets NaN as its scale, so that it
    cannot go unnoticed.
    """
    return quantized(x, active().quantize_q16, "quantize_q16")


def quantize_q8(const float[:, ::1] x not None, /):
    """Quantise activations to 8 bits per 32 values, as compute="int8" does: q = round(x / d), d = max|x| / 127.

    Shapes, errors and blocks of zeros or NaN are those of `quantize_q16`; rounds half to even.
    """
    return quantized(x, active().quantize_q8, "quantize_q8")


cdef tuple quantized(const float[:, ::1] x, woolly_quantize_fn quantize, str name):
    """The numbers of a record of quantised activations: q, d."""
    cdef int64_t n = x.shape[1], t, stride = woolly_q16_stride(n), begin = woolly_q16_scales(n)
    if n % WOOLLY_QBLOCK:
        raise ValueError(f"{name}: expected a multiple of {WOOLLY_QBLOCK} columns, got {n}")
    records = np.zeros((x.shape[0], stride), dtype=np.uint8)
    cdef uint8_t[:, ::1] view = records
    if n:
        with nogil:
            for t in range(x.shape[0]):
                quantize(&x[t, 0], n, &view[t, 0])
    digits = records[:, :2 * n].view(np.int8).astype(np.int32)
    scales = np.ascontiguousarray(records[:, begin:begin + n // WOOLLY_QBLOCK * 4])
    return 256 * digits[:, :n] + digits[:, n:], scales.view(np.float32)
