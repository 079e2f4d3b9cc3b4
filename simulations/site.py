"""Where a run lives: its folder, its environment, the commands that it starts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fedrebasin
from fedrebasin.errors import UsageError


@dataclass(frozen=True)
class Site:
    """The folder of one run: Flower's home, a neutral working directory, logs and what processes hand to each other."""

    folder: Path

    @property
    def home(self) -> Path:
        """Flower's home."""
        return self.folder / "home"

    @property
    def log(self) -> Path:
        """What SuperLink, server and clients printed."""
        return self.folder / "run.log"

    @property
    def progress(self) -> Path:
        """The JSON lines that server and clients write."""
        return self.folder / "progress.jsonl"

    def keep_only_the_log(self) -> None:
        """Delete everything else."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self.log:
                path.unlink(missing_ok=True)


def environment_of(site: Site) -> dict[str, str]:
    """The environment variables of the run's processes."""
    environment = dict(os.environ)
    here = str(Path(sys.executable).parent)
    # every process of the run imports the fedrebasin that this one runs
    library = str(Path(fedrebasin.__file__).parent.parent)
    environment |= {
        "FLWR_HOME": str(site.home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([here, environment.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [library, environment.get("PYTHONPATH", "")])),
    }
    return environment


@contextmanager
def folder_for_ray(site: Site) -> Iterator[str]:
    """A folder for Ray, which puts sockets there; the path of a socket has about 100 characters at most."""
    above = site.folder if len(str(site.folder)) < 30 else Path("/tmp")
    folder = tempfile.mkdtemp(prefix="ray-", dir=above)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_tool(name: str) -> str:
    """The path of a command that Flower installs, beside this Python or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UsageError(f'{name} is not installed; pip install "fedrebasin[simulation]"')
    return found
