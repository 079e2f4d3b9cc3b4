"""Folders with a user's modules in them, where `fedrebasin inspect` and `fedrebasin merge` are called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import merge_cases
import pytest
from inspected import USER_CODE


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "inspected_nets.py").write_text(USER_CODE)
    (folder / "inspected_broken.py").write_text("import inspected_lost")
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "merged_nets.py").write_text(merge_cases.USER_CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("merged_nets", None)
