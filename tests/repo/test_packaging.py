"""The installed package: one top-level name, its data, and an installation without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    target = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return target


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    return subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built as on a machine without a C++ compiler."""
    result = build_wheel(tree, CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tree / "dist").glob("kvkeye-*.whl")
    return path


def test_only_top_level_name_is_kvkeye(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvkeye"}
    assert {"kvkeye/triton_kernels/__init__.py", "kvkeye/ops/norm.py", "kvkeye/py.typed"} <= set(names)


def test_package_data_is_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kvkeye" / "assets").rglob("*") if p.is_file()}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "kvkeye").rglob("*.html")}
    assert expected <= names
    for package in (ROOT / "triton_kernels").rglob("*.py"):
        assert f"kvkeye/{package.relative_to(ROOT).as_posix()}" in names


def test_console_script(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "kvkeye = kvkeye.cli:main" in archive.read(entry).decode()


def test_without_a_compiler_it_installs_and_says_why(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert not list(tmp_path.glob("kvkeye/*.so"))
    info = json.loads((tmp_path / "kvkeye" / "_build_info.json").read_text())
    assert "no C++ compiler (no-such-compiler)" in info["cpp_reason"]
    code = (
        "import kvkeye, torch\n"
        "from kvkeye import ops\n"
        "print(kvkeye.__file__)\n"
        "print(ops.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())\n"
        "print(ops.rms_norm.explain(torch.ones(1, 4), torch.ones(4), 0.0))\n"
    )
    # The extracted wheel comes before the editable install on the path.
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "[[1.0, 1.0, 1.0, 1.0]]" in result.stdout
    assert "no C++ compiler" in result.stdout


def test_malformed_switch_is_refused(tree: Path) -> None:
    result = build_wheel(tree, KVKEYE_BUILD_NATIVE="yes")
    assert result.returncode != 0
    assert "KVKEYE_BUILD_NATIVE='yes': expected 0 or 1" in result.stdout + result.stderr


def test_folder_name_cannot_be_imported() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "kvkeye.triton_kernels" in result.stderr


def test_make_targets_are_plain() -> None:
    """Every target that documents name exists, and CI runs the test target."""
    text = (ROOT / "Makefile").read_text()
    for target in ("env", "demo", "test", "test-long", "lint", "native", "clean"):
        assert f"\n{target}:" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
