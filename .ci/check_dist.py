"""Look into a source distribution and a wheel: what must be there is, and the wheel holds nothing else."""

import sys
import tarfile
import zipfile
from pathlib import Path

SOURCES = ("*.py", "*.pyi", "*.pyx", "*.pxd", "*.h", "isa_*.c", "py.typed")
IN_WHEEL = (".py", ".pyi", ".so", "py.typed")

sdist, wheel = sys.argv[1:]
sources = {str(path) for pattern in SOURCES for path in Path("woolly").rglob(pattern)}
with tarfile.open(sdist) as archive:
    packed = {name.partition("/")[2] for name in archive.getnames()}
problems = [f"the source distribution lacks {name}" for name in sorted(sources - packed)]

with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    n_bytes = sum(info.compress_size for info in archive.infolist())
wanted = {name for name in sources if name.endswith(IN_WHEEL)}
problems += [f"the wheel lacks {name}" for name in sorted(wanted - names)]
problems += [f"the wheel holds {name}" for name in sorted(names - wanted) if not name.endswith(".so")]
kernels = {path.stem for path in Path("woolly/_kernels").glob("*.pyx")}
built = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
problems += [f"the wheel lacks the extension {name}" for name in sorted(kernels - built)]

print(f"{Path(wheel).name}: {len(names)} files, {n_bytes / 1e6:.1f} MB")
sys.exit("\n".join(problems) or None)
