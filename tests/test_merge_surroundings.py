"""``fedrebasin merge`` on a full disk, a plain install, with a saved spec and within its memory."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_cases import NET, hidden_files, load, output_of, plant, run

from fedrebasin.simulations import cli, merge_command
from fedrebasin.simulations.merge_memory import parse_memory

pytestmark = pytest.mark.usefixtures("folder")
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(folder)

    def full(*args: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_command, "match", full)
    assert run(f"a.safetensors b.safetensors {NET} --output out.safetensors") == 2
    said = capsys.readouterr().err
    assert "No space left on device; nothing was written" in said and said.count("\n") == 1
    assert hidden_files(folder) == []


def test_a_spec_that_inspect_proved_and_saved_is_taken(folder: Path) -> None:
    state = plant(folder)
    assert cli.run("inspect merged_nets:Net --input 2x3x8x8 --save spec.json".split()) == 0
    assert run("a.safetensors b.safetensors --spec spec.json --output out.safetensors") == 0
    torch.testing.assert_close(output_of(load("out.safetensors"), IMAGES), output_of(state, IMAGES))


def test_a_plain_install_without_the_extra_is_enough(folder: Path) -> None:
    plant(folder)
    np.save("images.npy", IMAGES.numpy())
    extras = "matplotlib PIL pyarrow sklearn torchvision flwr jinja2 datasets flwr_datasets ray".split()
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "from fedrebasin.simulations import cli\n"
        f"sys.exit(cli.run({shlex.split(f'merge a.safetensors b.safetensors {NET} --output out.safetensors')} + "
        "['--calibration', 'images.npy', '--correction', 'reset-batchnorm']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.safetensors").exists()


def test_a_system_without_what_only_posix_has_is_enough(folder: Path) -> None:
    """What Windows lacks: a signal, a module, a C library without a name."""
    plant(folder)
    code = (
        "import ctypes, signal, sys; import torch; del signal.SIGHUP; sys.modules['resource'] = None\n"
        "def library(name):\n    raise TypeError\n"
        "ctypes.CDLL = library\n"
        "from fedrebasin.simulations import cli\n"
        f"sys.exit(cli.run({f'merge a.safetensors b.safetensors {NET} --output out.safetensors --memory 9GB'.split()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "models were held" in done.stdout and "the peak" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process there")
def test_the_peak_of_a_merge_tensor_by_tensor_stays_under_the_limit(folder: Path) -> None:
    from fedrebasin.simulations.bench.merge import make_pair, run_merge

    make_pair(folder, 60, 512)  # 0.57 GB each
    assert run_merge(folder, "out", "--memory", "1GB")["peak-gb"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["merge-many", "straight-through-many", "cycle-consistent"])
def test_the_peak_of_models_that_are_held_stays_under_what_was_expected(method: str, folder: Path) -> None:
    from fedrebasin.simulations.bench.merge import make_pair

    make_pair(folder, 20, 256)
    shutil.copy("a.safetensors", "c.safetensors")
    line = "merge a.safetensors b.safetensors c.safetensors --spec spec.json --no-check --output out.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "fedrebasin.simulations.cli", *f"{line} --memory 9GB --method {method}".split()],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"expected (\S+ .B).*the peak of this process was (\S+ .B)", " ".join(done.stdout.split()))
    assert found is not None
    expected, peak = map(parse_memory, found.groups())
    assert peak is not None and expected is not None and peak <= expected
