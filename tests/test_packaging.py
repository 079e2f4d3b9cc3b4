"""The wheel: everything that an installation needs is in it, and nothing that belongs to others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fedrebasin", "strategies", "simulations")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path]:
    """The wheel's file list, and a folder into which it is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    site = folder / "site"
    # setuptools leaves build folders where it builds, so it builds a copy
    copy = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("fedrebasin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    return names, site


def left_out(folder: str, names: list[str]) -> set[str]:
    top = {".git", "build", "dist", "runs", "tests"} if Path(folder) == ROOT else set()
    return {name for name in names if name in top or name.endswith(".egg-info")}


def expected_files() -> set[str]:
    """Every source file, the app, the template and the result files, under the names of the installed package."""
    found = set()
    for source in SOURCES:
        for path in (ROOT / source).rglob("*"):
            parts = path.relative_to(ROOT).parts
            wanted = path.suffix in (".py", ".jinja", ".json", ".toml") or path.name == "py.typed"
            linked = parts[:2] in (("fedrebasin", "strategies"), ("fedrebasin", "simulations"))
            if path.is_file() and wanted and not linked and "__pycache__" not in parts:
                found.add("/".join(parts if source == "fedrebasin" else ("fedrebasin", *parts)))
    return found


def test_the_wheel_holds_every_source_file_the_app_the_template_and_the_results(
    installed: tuple[set[str], Path],
) -> None:
    names, _ = installed
    expected = expected_files()
    assert {
        "fedrebasin/py.typed",
        "fedrebasin/simulations/report.html.jinja",
        "fedrebasin/simulations/app/pyproject.toml",
        "fedrebasin/simulations/app/rebasin_compare/server_app.py",
        "fedrebasin/simulations/app/rebasin_compare/client_app.py",
    } <= expected
    assert sorted(expected - names) == []


def test_the_wheel_holds_one_package_its_licence_and_its_command(installed: tuple[set[str], Path]) -> None:
    names, site = installed
    tops = {name.split("/")[0] for name in names}
    (about,) = tops - {"fedrebasin"}  # `strategies` at the top would overwrite somebody else's
    assert about.startswith("fedrebasin-")
    assert "Apache License" in (site / about / "licenses" / "LICENSE").read_text()
    assert "fedrebasin = fedrebasin.simulations.cli:main" in (site / about / "entry_points.txt").read_text()
    metadata = (site / about / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: simulation" in metadata


def test_every_module_of_the_wheel_can_be_imported(installed: tuple[set[str], Path]) -> None:
    names, site = installed
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names
        if name.startswith("fedrebasin/") and name.endswith(".py") and "/app/" not in name
    )
    assert {
        "fedrebasin.matching",
        "fedrebasin.corrections",
        "fedrebasin.strategies",
        "fedrebasin.simulations.cli",
    } <= set(modules)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(importlib.import_module('fedrebasin').__file__)"
    )
    done = python(site, "-c", code, *modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "fedrebasin" / "__init__.py")


def test_the_command_runs_from_the_wheel_and_finds_its_app(installed: tuple[set[str], Path]) -> None:
    _, site = installed
    done = python(site, "-m", "fedrebasin.simulations.cli", "compare", "--start", "late")
    expected = "fedrebasin: --start: expected apart, common or joins:ROUND; got 'late'\n"
    assert (done.returncode, done.stderr) == (2, expected)
    code = (
        "from fedrebasin.simulations.compare import APP\n"
        "from flwr.cli.config_utils import load_and_validate\n"
        "print(load_and_validate(APP / 'pyproject.toml')[1])"
    )
    done = python(site, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python outside of the checkout, with the wheel before everything else."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, *arguments]
    return subprocess.run(call, cwd=site.parent, env=environment, capture_output=True, text=True, check=False)
