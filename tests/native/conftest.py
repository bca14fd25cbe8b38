"""Fixtures of the native tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants


@pytest.fixture(scope="session")
def cuda_builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the CUDA sources are built for the host: one folder for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda_builds"


@pytest.fixture(scope="session")
def asan(cuda_builds: Path) -> Path:
    return harness.build("asan", cuda_builds, plants=plants.ALL)


@pytest.fixture(scope="session")
def races(cuda_builds: Path) -> Path:
    return harness.build("races", cuda_builds, plants=plants.ALL)


@pytest.fixture(scope="session", params=["asan", "races"])
def program(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found
