"""The table of kernels in use: chosen at import from what the machine has, or by WOOLLY_ISA."""

import os
from contextlib import contextmanager

from woolly._kernels.kernels cimport WOOLLY_ROUNDED_LEAST_COLS, woolly_bf16_unit, woolly_kernels
from woolly.errors import UnsupportedFormatError, UnsupportedISAError, WoollyError

cdef extern from *:
    """
    #include "kernels.h"
    extern const woolly_kernels woolly_kernels_scalar;
    #ifdef WOOLLY_X86
    #include <cpuid.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    extern const woolly_kernels woolly_kernels_avx2, woolly_kernels_avx_vnni, woolly_kernels_avx512;
    extern const woolly_kernels woolly_kernels_avx512_amx __attribute__((weak)); /* absent if the compiler lacks AMX */
    extern int woolly_amx_rounds_once(void) __attribute__((weak));
    extern const woolly_bf16_unit woolly_bf16_avx512 __attribute__((weak)), woolly_bf16_amx __attribute__((weak));
    #define HAS(feature) __builtin_cpu_supports(feature)
    #define HAS_AVX2 (HAS("avx2") && HAS("fma") && HAS("bmi2"))

    /* AVX-VNNI by its bit, as older compilers have no name for it */
    static int has_avx_vnni(void) {
        unsigned int a, b, c, d;
        return HAS_AVX2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
    }

    /* Linux lets a process use the tile registers when it has asked for them */
    static int tiles_permitted(void) {
    #if defined(__linux__) && defined(SYS_arch_prctl)
        enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    #else
        return 0;
    #endif
    }
    #endif

    enum { SCALAR, AVX2, AVX_VNNI, AVX512, AVX512_AMX };

    /* Every table that was compiled, best last, NULL after the last; and whether this machine can run each */
    static const woolly_kernels *compiled_table(int i) {
        switch (i) {
        case SCALAR: return &woolly_kernels_scalar;
    #ifdef WOOLLY_X86
        case AVX2: return &woolly_kernels_avx2;
        case AVX_VNNI: return &woolly_kernels_avx_vnni;
        case AVX512: return &woolly_kernels_avx512;
        case AVX512_AMX: return &woolly_kernels_avx512_amx;
    #endif
        }
        return NULL;
    }
    static int machine_runs(int i) {
        switch (i) {
        case SCALAR: return 1;
    #ifdef WOOLLY_X86
        case AVX2: return HAS_AVX2;
        case AVX_VNNI: return woolly_kernels_avx_vnni.n_formats && has_avx_vnni();
        case AVX512: return HAS_AVX2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") &&
                            HAS("avx512vnni");
        case AVX512_AMX: return machine_runs(AVX512) && HAS("amx-tile") && HAS("amx-bf16") && tiles_permitted() &&
                                woolly_amx_rounds_once();
    #endif
        }
        return 0;
    }

    /* What compute="bf16" runs on beside each table, where this machine has it */
    static const woolly_bf16_unit *bf16_unit_of(int i) {
    #ifdef WOOLLY_X86
        if (i == AVX512 && HAS("avx512bf16")) return &woolly_bf16_avx512;
        if (i == AVX512_AMX) return &woolly_bf16_amx;
    #endif
        return NULL;
    }
    """
    const woolly_kernels *compiled_table(int i)
    bint machine_runs(int i)
    const woolly_bf16_unit *bf16_unit_of(int i)

cdef const woolly_kernels *active_table = NULL
cdef const woolly_bf16_unit *active_unit = NULL
COMPUTES = ("exact", "int8", "bf16")
BF16_LEAST_TOKENS = WOOLLY_ROUNDED_LEAST_COLS  # fewer are computed exactly with bf16


cdef const woolly_kernels *active() noexcept nogil:
    return active_table


cdef Activations active_activations(compute) except *:
    check_compute(compute)
    cdef Activations how
    how.unit = active_unit if compute == "bf16" else NULL
    if compute == "int8":
        how.n_digits, how.quantize, how.bf16_of = 1, active_table.quantize_q8, active_table.bf16_of_q8
    else:
        how.n_digits, how.quantize, how.bf16_of = 2, active_table.quantize_q16, active_table.bf16_of_q16
    if how.unit != NULL:
        how.bf16_of = NULL
    return how


def bf16_unit():
    """Name of the dot unit that compute="bf16" uses beside the active instruction set, None where there is none.

    Returns
    -------
    {"amx_bf16", "avx512_bf16"} or None
    """
    return active_unit.name.decode() if active_unit != NULL else None


def check_compute(compute, /):
    """Refuse a way to compute that is unknown or that this machine cannot take.

    Raises
    ------
    WoollyError
        It is none of "exact", "int8" and "bf16".
    UnsupportedISAError
        There is no BF16 dot unit beside the active instruction set.
    """
    if compute not in COMPUTES:
        raise WoollyError(f"compute: expected one of {', '.join(COMPUTES)}, got {compute!r}")
    if compute == "bf16" and active_unit == NULL:
        raise UnsupportedISAError(
            'compute="bf16" needs AMX-BF16 or AVX512_BF16, used beside avx512_amx and avx512; this machine has '
            f'neither, or WOOLLY_ISA hides it (the active ISA is {active_isa()}); "exact" and "int8" run everywhere')


def compiled_isas():
    """Names of the instruction sets this build holds, weakest first.

    Returns
    -------
    tuple of str
    """
    names = []
    while compiled_table(len(names)) != NULL:
        names.append(compiled_table(len(names)).name.decode())
    return tuple(names)


def available_isas():
    """Names of the instruction sets that this build holds and this machine runs, weakest first.

    Returns
    -------
    tuple of str
    """
    return tuple(name for i, name in enumerate(compiled_isas()) if machine_runs(i))


def active_isa():
    """Name of the instruction set in use.

    Returns
    -------
    str
    """
    return active_table.name.decode()


def set_isa(name, /):
    """Use the kernels of one instruction set from now on, in the whole process.

    Results do not change (the numerical contract); speed does. Not to be called while a kernel runs.

    Parameters
    ----------
    name : str
        One of `available_isas()`.

    Raises
    ------
    UnsupportedISAError
        The name is unknown or the machine cannot run it.
    """
    global active_table, active_unit
    names = compiled_isas()
    if name not in available_isas():
        why = "this machine cannot run it" if name in names else "there is no such instruction set in this build"
        raise UnsupportedISAError(f"ISA {name!r}: {why}; available: {', '.join(available_isas())}")
    active_table = compiled_table(names.index(name))
    active_unit = bf16_unit_of(names.index(name))


@contextmanager
def use_isa(name, /):
    """`set_isa` for the length of a with block."""
    before = active_isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def kernel_formats():
    """Names of the tensor formats that have kernels, with their sizes.

    Returns
    -------
    dict of str to tuple of int
        name -> (ggml type, weights a block, bytes a block)
    """
    formats = {}
    for i in range(active_table.n_formats):
        f = active_table.formats[i]
        formats[f.name.decode()] = (f.ggml_type, f.block_size, f.block_bytes)
    return formats


def converted_formats():
    """Names of the formats that are stored as another one when they are packed: F64 as F32, those of 1 to 3 bits at 4.

    Returns
    -------
    tuple of str
    """
    return tuple(active_table.formats[i].name.decode() for i in range(active_table.n_formats)
                 if active_table.formats[i].is_converted)


def format_index(name, /):
    """Place of a format in the kernel table.

    Raises
    ------
    UnsupportedFormatError
        No kernel takes this format.
    """
    names = list(kernel_formats())
    if name not in names:
        raise UnsupportedFormatError(f"format {name!r} has no kernels; those that have: {', '.join(names)}")
    return names.index(name)


set_isa(os.environ.get("WOOLLY_ISA") or available_isas()[-1])
