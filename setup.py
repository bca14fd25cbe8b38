"""Builds the native libraries with CMake and maps the package folders. Knows no kernel by name.

Without a C++ compiler, or with KVKEYE_BUILD_NATIVE=0, the package installs all the same; the reason is written to
kvkeye/_build_info.json, from where `kvkeye doctor` and the op layer repeat it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = {"cpp": "libkvkeye_cpu.*", "cuda": "libkvkeye_cuda.*", "host": "_host.*.so"}
ABSENT = {
    "cpp": "it was not built",
    "cuda": "no CUDA compiler (nvcc) was found at build time",
    "host": "pybind11 or its sources were missing at build time",
}


def tool(name: str) -> str | None:
    """A program of this Python environment, else of PATH."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def why_not() -> str | None:
    """Why native code cannot be built here, or None."""
    switch = os.environ.get("KVKEYE_BUILD_NATIVE", "1")
    if switch not in ("0", "1"):
        raise SystemExit(f"KVKEYE_BUILD_NATIVE={switch!r}: expected 0 or 1. Unset it to build native code.")
    if switch == "0":
        return "it was built with KVKEYE_BUILD_NATIVE=0"
    compiler = os.environ.get("CXX")
    if not any(map(shutil.which, [compiler] if compiler else ["c++", "g++", "clang++"])):
        return f"no C++ compiler ({compiler or 'c++, g++ or clang++'}) was found at build time"
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    return f"{' and '.join(missing)} not found at build time" if missing else None


def compile_libraries(build: Path) -> None:
    """Configures and builds everything in the folder `build`."""
    cmake = str(tool("cmake"))
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
        if (code := subprocess.call(command)) != 0:
            raise SystemExit(
                f"kvkeye: `{' '.join(command)}` failed with status {code}; its output is above. "
                "Set KVKEYE_BUILD_NATIVE=0 to install without native code."
            )


class BuildNative(build_ext):
    """One step for all native targets; the extension below only names the sources and makes the wheel binary."""

    def target(self) -> Path:
        return ROOT / "kvkeye" if self.inplace else Path(self.build_lib).resolve() / "kvkeye"

    def run(self) -> None:
        target = self.target()
        target.mkdir(parents=True, exist_ok=True)
        info = {"python": sysconfig.get_python_version(), "platform": sysconfig.get_platform()}
        build = ROOT / "build" / "native" if self.inplace else Path(self.build_temp).resolve()
        if (reason := why_not()) is None:
            compile_libraries(build)
        # Removed, not overwritten: a running process may have them mapped.
        for path in self.built():
            path.unlink()
        if reason is None:
            install = ["--install", str(build), "--prefix", str(target), "--component", "kvkeye"]
            subprocess.check_call([str(tool("cmake")), *install])
        for name, pattern in LIBRARIES.items():
            if not list(target.glob(pattern)):
                info[f"{name}_reason"] = reason or ABSENT[name]
        (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def built(self) -> list[Path]:
        patterns = (*LIBRARIES.values(), "_build_info.json")
        return [path for pattern in patterns for path in self.target().glob(pattern)]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def native_sources() -> list[str]:
    files = ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*")))]
    return [name for name in files if not name.endswith(".md")]


triton_packages = ["", *("." + name for name in find_packages("triton_kernels"))]
setup(
    packages=find_packages(include=["kvkeye", "kvkeye.*"])
    + [f"kvkeye.triton_kernels{name}" for name in triton_packages],
    package_dir={"kvkeye": "kvkeye", "kvkeye.triton_kernels": "triton_kernels"},
    package_data={
        "kvkeye": ["py.typed", "*.pyi", "assets/**/*", "serve/**/*.html", "train/recipes/*.toml"],
        "kvkeye.triton_kernels": ["**/*.json"],
    },
    ext_modules=[Extension("kvkeye._native", native_sources())],
    cmdclass={"build_ext": BuildNative},
)
