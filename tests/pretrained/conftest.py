"""A cache of its own for each test, and a folder with a tiny teacher."""

from pathlib import Path

import pytest

from tests.pretrained.teachers import save_teacher


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_teacher(tmp_path / "teacher")
    return tmp_path / "teacher"
