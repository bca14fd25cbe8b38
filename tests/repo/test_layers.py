"""The layering of DESIGN: imports go downwards only, leaves know nothing of each other, no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kvkeye"

#: Layer of each sub-package; a module imports its own layer's package or a lower layer.
LAYERS = {
    "cli": 7, "serve": 6, "integrations": 6, "engine": 5, "video": 5, "train": 5, "models": 4, "media": 4,
    "layers": 3, "ops": 2, "triton_kernels": 1, "host": 1, "_host_py": 0, "_host_ngram_py": 0, "_host": 0,
    "env": 0, "errors": 0, "utils": 0, "__init__": 0,
}  # fmt: skip
PEERS = {("serve", "integrations"), ("engine", "video"), ("engine", "train"), ("video", "train")}
NO_TORCH = [f"engine/{name}.py" for name in ("request", "block_manager", "prefix_cache", "encoder_cache", "scheduler")]


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names that a file imports; TYPE_CHECKING blocks are left out."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST, depth: int) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            if not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                visit(child, depth + 1)

    visit(tree, 0)
    return found


def part(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own in ("testing", "__init__", "__main__"):
        allowed = {"ops", "models", "layers", "env", "errors", "utils", "testing", "__init__", "triton_kernels"}
        wrong = {n for n in imported(path, True) if n.startswith("kvkeye.") and own == "testing"} - set()
        assert all(part(n) in allowed for n in wrong), wrong
        return
    for name in imported(path):
        if not name.startswith("kvkeye") or part(name) == own:
            continue
        target = part(name)
        target = target if target in LAYERS else "__init__"
        assert target != "testing", f"{relative} imports {name}: testing is for tests and benchmarks"
        assert LAYERS[target] <= LAYERS[own], f"{relative} ({own}) imports {name}: upwards"
        assert (own, target) not in PEERS and (target, own) not in PEERS, f"{relative} imports its peer {name}"


@pytest.mark.parametrize("name", NO_TORCH)
def test_bookkeeping_knows_no_torch(name: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        f"import importlib; importlib.import_module('kvkeye.{name.removesuffix('.py').replace('/', '.')}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_ops_names_the_leaves() -> None:
    for path in modules():
        if path.relative_to(PACKAGE).parts[0] == "ops":
            continue
        text = path.read_text()
        assert "torch.ops.kvkeye_c" not in text, path
        assert not any(n.startswith("kvkeye.triton_kernels") for n in imported(path)), path


def test_triton_leaves_import_only_torch_triton_and_themselves() -> None:
    standard = "__future__ collections functools itertools json math os pathlib typing"
    allowed = {"torch", "triton", *standard.split()}
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_native_kernels_are_free_of_frameworks() -> None:
    for folder in ("include", "cpu", "cuda", "host"):
        for path in (ROOT / "csrc" / folder).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
                text = path.read_text()
                assert "#include <torch/" not in text and "#include <ATen/" not in text, path


def test_no_import_cycles() -> None:
    graph = {}
    for path in modules():
        name = "kvkeye." + str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        graph[name.removesuffix(".__init__")] = imported(path, top_level_only=True)
    edges = {
        source: {t for n in names for t in (n, n.rpartition(".")[0]) if t in graph and t != source}
        for source, names in graph.items()
    }
    state: dict[str, int] = {}

    def visit(node: str, trail: tuple[str, ...]) -> None:
        state[node] = 1
        for target in edges[node]:
            # A package's __init__ gathers its modules; naming the package from inside is not a cycle of modules.
            if source_package(target) == target and node.startswith(target + "."):
                continue
            assert state.get(target) != 1, f"import cycle: {' > '.join([*trail, node, target])}"
            if target not in state:
                visit(target, (*trail, node))
        state[node] = 2

    def source_package(name: str) -> str:
        path = PACKAGE.parent / name.replace(".", "/")
        return name if path.is_dir() else ""

    for node in sorted(edges):
        if node not in state:
            visit(node, ())


def test_import_has_no_side_effects() -> None:
    code = (
        "import sys, threading; import kvkeye; assert 'torch' not in sys.modules; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
