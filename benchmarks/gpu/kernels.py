"""Check and time every Triton kernel; an error is a kernel that would fall back to plain torch."""

from benchmarks import gpu_kernels
from benchmarks.gpu.lines import arguments, lines


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    shapes = gpu_kernels.TINY if options.tiny else gpu_kernels.Shapes()
    for work, given in gpu_kernels.passes(shapes, options.device).items():
        record = gpu_kernels.measured(work, given, options.device)
        state = record.get("state", "runs")
        write(record if state == "runs" else {**record, "error": state})


if __name__ == "__main__":
    main()
