"""The only import of bitsandbytes: it downloads nothing, prints nothing, and leaves `kernels` importable."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qlora.runtime.patches import KERNELS_FAILED, kernels_hidden

PROGRAM = """
import kernels, sys
import qlora.training.train
assert sys.modules["kernels"] is kernels
assert "torch._inductor.lowering" not in sys.modules, "torch's compiler takes seconds to import"
kernels.get_kernel("nothing")
"""


def test_the_package_asks_no_hub_for_kernels_and_prints_nothing(tmp_path: Path) -> None:
    """Run in a new process in which a `kernels` package is imported already. Can only fail on CPUs with AVX512-BF16."""
    (tmp_path / "kernels.py").write_text("def get_kernel(name, **_): print('asked for', name)")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("asked for nothing\n", "")


@pytest.mark.parametrize("before", [ModuleType("kernels"), None])
def test_kernels_is_hidden_only_while_bitsandbytes_is_imported(
    before: ModuleType | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    if before is not None:
        monkeypatch.setitem(sys.modules, "kernels", before)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with kernels_hidden():
        with pytest.raises(ImportError):
            import kernels  # noqa: F401
        logger.warning(f"{KERNELS_FAILED}: %s. Please install it", "import failed")
        logger.warning("Something else")
    assert sys.modules.get("kernels") is before
    logger.warning(KERNELS_FAILED)
    assert [record.getMessage() for record in caplog.records] == ["Something else", KERNELS_FAILED]
