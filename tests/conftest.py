"""A folder with a user's modules in it, where `fedrebasin inspect` is called."""

from __future__ import annotations

from pathlib import Path

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
