"""On an accelerator all comes out as on the CPU: seen on a device that refuses CPU tensors beside its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

RUN = Path(__file__).parent / "accelerator_run.py"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
def test_every_part_gives_on_a_device_what_it_gives_on_the_cpu() -> None:
    """The device computes with the CPU's kernels, and refuses tensors from both."""
    found = subprocess.run([sys.executable, RUN], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert lines[0] == "mixed devices: " and len(lines) > 80
    assert [line for line in lines if not line.endswith(": ")] == []
