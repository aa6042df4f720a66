"""The Nth large allocation, read or mmap of opening a model and generating fails, for every N.

A shim in C, loaded before the C library, makes it fail; without gcc the test is skipped. What may come is MemoryError,
OSError or an error of Woolly's, and afterwards the same process computes the same tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_builder import F32, UINT32, ModelParts, u32

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
enum { ALLOCATION, READ, MMAP, N_KINDS };
static long left, least, seen[N_KINDS];
static int failed = -1;

/* From now on the n-th event fails; n_seen gets how many of each kind there were before, and which failed comes back */
int arm_fault(long n, long least_bytes, long *n_seen) {
    int kind = failed;
    for (int i = 0; i < N_KINDS; i++) n_seen[i] = seen[i], seen[i] = 0;
    left = n, least = least_bytes, failed = -1;
    return kind;
}
static int fails_as(int kind) { return seen[kind]++, left > 0 && --left == 0 && (failed = kind, 1); }
static int fails(size_t n) { return least && n >= (size_t)least && fails_as(ALLOCATION); }

void *malloc(size_t n) { if (fails(n)) { errno = ENOMEM; return 0; } return __libc_malloc(n); }
void *calloc(size_t k, size_t n) { if (fails(k * n)) { errno = ENOMEM; return 0; } return __libc_calloc(k, n); }
void *realloc(void *p, size_t n) { if (fails(n)) { errno = ENOMEM; return 0; } return __libc_realloc(p, n); }
int posix_memalign(void **p, size_t align, size_t n) {
    if (fails(n)) return ENOMEM;
    return (*p = __libc_memalign(align, n)) ? 0 : ENOMEM;
}
void *mmap(void *p, size_t n, int prot, int flags, int fd, off_t at) {
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (least && n >= (size_t)least && fails_as(MMAP)) { errno = ENOMEM; return MAP_FAILED; }
    if (!real) real = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    return real(p, n, prot, flags, fd, at);
}
void *mmap64(void *p, size_t n, int prot, int flags, int fd, off_t at) { return mmap(p, n, prot, flags, fd, at); }
ssize_t read(int fd, void *p, size_t n) {
    static ssize_t (*real)(int, void *, size_t);
    if (least && fails_as(READ)) { errno = EIO; return -1; }
    if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    return real(fd, p, n);
}
ssize_t pread(int fd, void *p, size_t n, off_t at) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (least && fails_as(READ)) { errno = EIO; return -1; }
    if (!real) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    return real(fd, p, n, at);
}
ssize_t pread64(int fd, void *p, size_t n, off_t at) { return pread(fd, p, n, at); }
ssize_t preadv(int fd, const struct iovec *to, int n, off_t at) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (least && fails_as(READ)) { errno = EIO; return -1; }
    if (!real) real = (ssize_t (*)(int, const struct iovec *, int, off_t))dlsym(RTLD_NEXT, "preadv");
    return real(fd, to, n, at);
}
ssize_t preadv64(int fd, const struct iovec *to, int n, off_t at) { return preadv(fd, to, n, at); }
"""

SCRIPT = """
import ctypes, json, sys
import woolly, woolly.loading, woolly.tokenizer, woolly.sampling, woolly.sandbox

seen = (ctypes.c_long * 3)()
arm_fault = ctypes.CDLL(sys.argv[2]).arm_fault
arm_fault.argtypes = (ctypes.c_long, ctypes.c_long, type(seen))
KINDS = ("allocation", "read", "mmap")
LEAST_BYTES = 70_000  # numpy itself crashes where one of its own buffers, of at most 64 KiB, cannot be had

def arm(n, least_bytes):
    kind = arm_fault(n, least_bytes, seen)
    return None if kind < 0 else KINDS[kind]

def attempt():
    with woolly.load_gguf(sys.argv[1], n_threads=1) as model:
        return model.generate([1, 4, 5], max_tokens=4, temperature=0).tokens

expected = attempt()
outcomes, n = {}, 0
while True:
    n += 1
    arm(n, LEAST_BYTES)
    try:
        found = attempt()
    except (MemoryError, OSError, woolly.WoollyError) as error:
        found = None
        name = type(error).__name__
    kind = arm(0, 0)
    if kind is None:
        break
    if found is not None:
        assert found == expected, (n, found)
        name = "unharmed"
    for key in (name, kind):
        outcomes[key] = outcomes.get(key, 0) + 1
    if n % 10 == 0:
        assert attempt() == expected, n
assert attempt() == expected
print(json.dumps({"faults": n - 1, **outcomes}))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or not sys.platform.startswith("linux"), reason="needs gcc and glibc")
def test_every_large_allocation_read_and_mmap_may_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the shim does not compile here: {done.stderr[-300:]}")
    model = tmp_path / "model.gguf"
    parts = ModelParts(hidden=256, matrix_type=F32).set("llama.context_length", UINT32, u32(4096))
    model.write_bytes(parts.build())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(shim)],
        env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    with capsys.disabled():
        print(f" {report} ", end="")
    assert report["faults"] > 20
    assert report["MemoryError"] > 10
    assert report["allocation"] > 10
    assert report["read"] > 0
    assert report["mmap"] > 0
