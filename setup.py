"""The instruction sets, their compiler flags, and the extensions. Metadata and tools' settings are in pyproject.toml.

The micro-kernels in woolly/_kernels/c are compiled once per instruction set into a static library that exports one
table of functions. The Cython extensions are compiled once, at the platform's baseline, and call through the table.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

# -fno-tree-ter: the pass moves additions away from the products they take up, which then fill the stack.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-fno-tree-ter"]
X86_ISAS = {
    "scalar": [],
    "avx2": AVX2,
    "avx_vnni": AVX2,  # and what isa_avx_vnni.c adds
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2"],
}
OTHER_ISAS = {"scalar": []}

KERNELS = Path("woolly/_kernels")
is_x86 = platform.machine().lower() in ("x86_64", "amd64") and os.environ.get("WOOLLY_SCALAR", "0") != "1"
isas = X86_ISAS if is_x86 else OTHER_ISAS

# Builds for tests, each in a folder of its own (.ci/sanitize): WOOLLY_SANITIZE=address,undefined; WOOLLY_DEBUG=1 for
# more of Cython's checks; WOOLLY_SCALAR=1 as on other processors. Every build checks indices of memoryviews.
sanitizers = os.environ.get("WOOLLY_SANITIZE", "")
is_debug = os.environ.get("WOOLLY_DEBUG", "0") == "1"
CHECK_FLAGS = []
if sanitizers:
    CHECK_FLAGS += ["-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

# -ffp-contract=off: an fma happens where the source says so, on every instruction set alike.
# -fno-ivopts, -g0, max-combine-insns: on these unrolled loops the passes take minutes, for nothing that was measured.
C_FLAGS = ["-std=gnu11", "-O3", "-g0", "-fno-ivopts", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
C_FLAGS += ["--param", "max-combine-insns=2"]
C_FLAGS += ["-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
headers = sorted(str(path) for path in KERNELS.glob("c/**/*.h"))
depends = {"": headers}

libraries = [
    (
        f"woolly_{isa}",
        {"sources": [str(KERNELS / f"c/isa_{isa}.c")], "cflags": C_FLAGS + flags + CHECK_FLAGS, "obj_deps": depends},
    )
    for isa, flags in isas.items()
]

EXTENSION_FLAGS = ["-O2", "-g0", "-ffp-contract=off", "-fopenmp", "-Wno-unused-function", "-Wno-array-bounds"]
# Loops over float lanes in plain C, which are vectorised from -O3 on, where comparisons need not trap.
FLAGS_OF = {"quantize": ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]}

directives = {"language_level": 3, "cdivision": True, "embedsignature": True, "freethreading_compatible": True}
if is_debug:
    directives |= dict.fromkeys(["overflowcheck", "nonecheck"], True)

extensions = [
    Extension(
        f"woolly._kernels.{path.stem}",
        [str(path)],
        include_dirs=[str(KERNELS / "c"), numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")] + ([("WOOLLY_X86", "1")] if is_x86 else []),
        extra_compile_args=EXTENSION_FLAGS + FLAGS_OF.get(path.stem, []) + CHECK_FLAGS,
        extra_link_args=["-fopenmp", *CHECK_FLAGS],
        libraries=["m"],
        depends=headers,
    )
    for path in sorted(KERNELS.glob("*.pyx"))
]


class BuildLibraries(build_clib):
    """build_clib, one thread an instruction set: compilers are processes of their own."""

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


class BuildKernels(build_ext):
    """build_ext that builds the per-ISA libraries first, also with --inplace and in editable installs."""

    def run(self):
        self.parallel = self.parallel or os.cpu_count()
        self.run_command("build_clib")
        super().run()


setup(
    libraries=libraries,
    ext_modules=cythonize(extensions, compiler_directives=directives, nthreads=os.cpu_count()),
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildKernels},
)
