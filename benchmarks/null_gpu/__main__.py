"""Run a program with torch's CUDA on a simulated GPU that counts memory and launches and computes nothing.

    python -m benchmarks.null_gpu [--gib 80] SCRIPT [ARGUMENT ...]
    python -m benchmarks.null_gpu -m MODULE [ARGUMENT ...]

Needs gcc, and a CUDA build of torch 2.11 or later with its CUDA 13 wheels. See README.md.
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
"""functions left to the real libraries, which need no device for them"""


def main() -> None:
    """Replace this process by the program, with the simulated GPU loaded."""
    arguments = sys.argv[1:]
    gib = "80"
    if arguments[:1] == ["--gib"]:
        gib, arguments = arguments[1], arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is built without CUDA; install a CUDA build from PyPI")
    folder = built(Path(torch.__file__).parents[1])
    environment = os.environ | {
        "LD_PRELOAD": str(folder / "libnullgpu.so"),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": f"{HERE / 'site'}:{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "NULLGPU_GIB": gib,
    }
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def built(site: Path) -> Path:
    """Return the folder of the two libraries for the packages in `site`; compile them if they are missing."""
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
    missing = sorted(called(site) - names(first, "--defined-only") - REAL)
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    subprocess.run([*compiler, runtime, rest, "-o", folder / "libnullgpu.so"], check=True)
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([*compiler, driver, nothing, soname, "-o", folder / "libcuda.so.1"], check=True)
    return folder


def called(site: Path) -> set[str]:
    """Return the functions of the CUDA runtime and of cuBLAS that torch and bitsandbytes call."""
    libraries = [site / "torch/lib" / f"lib{name}.so" for name in ("c10_cuda", "torch_cuda", "torch_python")]
    libraries += site.glob("bitsandbytes/libbitsandbytes_cuda13*.so")
    symbols = set().union(*(names(library, "--undefined-only") for library in libraries))
    return {name for name in symbols if re.match("cuda|cublas", name)}


def names(library: Path, which: str) -> set[str]:
    """Return the symbols that a library defines or requires, as `nm` lists them with the option `which`."""
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


if __name__ == "__main__":
    main()
