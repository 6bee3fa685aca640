"""Run a program on a GPU that is not there: torch's CUDA, with memory and launches counted, and nothing computed.

    python -m benchmarks.null_gpu [--gib 80] SCRIPT [ARGUMENT ...]
    python -m benchmarks.null_gpu -m MODULE [ARGUMENT ...]

Needs a CUDA build of torch 2.11 or later with its wheels of CUDA 13, and gcc. See README.md.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
REAL = {"cudaRuntimeGetVersion", "cublasLtGetVersion"}
"""which the real libraries answer without a device"""


def main() -> None:
    """The command line: replaces this process by the program."""
    arguments = sys.argv[1:]
    gib = "80"
    if arguments[:1] == ["--gib"]:
        gib, arguments = arguments[1], arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is built without CUDA: install the build of the package index")
    folder = built(Path(torch.__file__).parents[1])
    environment = os.environ | {
        "LD_PRELOAD": str(folder / "libnullgpu.so"),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": f"{HERE / 'site'}:{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "NULLGPU_GIB": gib,
    }
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def built(site: Path) -> Path:
    """The folder with the two libraries for the packages in `site`, made if need be."""
    sources = [HERE / name for name in ("runtime.c", "driver.c", "nothing.c")]
    seed = torch.__version__.encode() + b"".join(source.read_bytes() for source in sources)
    folder = Path("~/.cache/qlora-null-gpu").expanduser() / hashlib.sha256(seed).hexdigest()[:12]
    if (folder / "libcuda.so.1").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    runtime, driver, nothing = sources
    include = [f"-I{site}/nvidia/cu13/include", f"-I{site}/triton/backends/nvidia/include"]
    compiler = ["gcc", "-O1", "-fPIC", "-shared", "-w", *include]
    first = folder / "first.so"
    subprocess.run([*compiler, runtime, "-o", first], check=True)
    rest = folder / "rest.c"
    missing = sorted(asked(site) - names(first, "--defined-only") - REAL)
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    subprocess.run([*compiler, runtime, rest, "-o", folder / "libnullgpu.so"], check=True)
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([*compiler, driver, nothing, soname, "-o", folder / "libcuda.so.1"], check=True)
    return folder


def asked(site: Path) -> set[str]:
    """What torch and bitsandbytes call of CUDA's runtime and of cuBLAS."""
    libraries = [site / "torch/lib" / f"lib{name}.so" for name in ("c10_cuda", "torch_cuda", "torch_python")]
    libraries += site.glob("bitsandbytes/libbitsandbytes_cuda13*.so")
    found = set().union(*(names(library, "--undefined-only") for library in libraries))
    return {name for name in found if re.match("cuda|cublas", name)}


def names(library: Path, which: str) -> set[str]:
    """Symbols that a library defines or asks for."""
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


if __name__ == "__main__":
    main()
