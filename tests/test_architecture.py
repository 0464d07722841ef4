"""The floors of CONTRIBUTING.md: imports run downwards only, and what a loader must never do is nowhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdit"

# What each room may import of fastdit, besides itself. `__init__` and `_version` are read by everybody.
BOTTOM = {"backend", "validation", "files", "distributed", "reference", "kernels"}
FLOORS = {
    "reference": set(),
    "kernels": set(),
    "files": set(),
    "validation": set(),
    "distributed": set(),
    "backend": {"validation"},
    "testing": set(),
    "attention": BOTTOM | {"testing"},
    "ops": BOTTOM | {"attention"},
    "models": BOTTOM | {"attention", "ops"},
    "diffusion": BOTTOM,
    "data": BOTTOM,
    "weights": BOTTOM | {"ops", "models"},
    "sampling": BOTTOM | {"ops", "models", "diffusion", "data", "weights"},
    "training": BOTTOM | {"ops", "models", "diffusion", "data", "weights", "sampling"},
    "demo": BOTTOM | {"ops", "models", "diffusion", "data", "weights", "sampling", "training"},
}
FLOORS["cli"] = FLOORS["demo"] | {"demo", "testing", "attention"}
FLOORS["__main__"] = {"cli"}
EVERYBODY = {"_version"}
# Methods that users look for on the model; what they need is imported when they are called.
UPWARDS = {"models/dit.py": {"weights"}}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules that `path` imports, as absolute dotted names."""
    parts = ("fastdit", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from . import x` names a module, `from .x import name` is in one.
            found |= (
                {f"{module}.{alias.name}" for alias in node.names} if not node.module else {module}
            )
            if module == "fastdit":
                found |= {f"fastdit.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name not in ("__init__.py", "_version.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    allowed = FLOORS[room] | EVERYBODY | {room}
    allowed |= UPWARDS.get(str(path.relative_to(PACKAGE)), set())
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("fastdit.")}
    assert used <= allowed, f"{room} may not import {sorted(used - allowed)}"
    assert "kernels" not in {name.split(".")[0] for name in imports_of(path)}


def test_the_floors_are_seen() -> None:
    """The parser above finds relative imports: the rooms below are really imported."""
    assert "fastdit.reference" in imports_of(PACKAGE / "ops" / "layer_norm_modulate.py")
    assert "fastdit.ops" in imports_of(PACKAGE / "models" / "blocks.py")


def test_kernels_is_a_symlink_without_init() -> None:
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


FORBIDDEN = {
    "pickle": r"\bpickle\.loads?\(",
    "torch.load without weights_only=True": r"torch\.load\((?![^)]*weights_only=True)",
    "yaml.load": r"yaml\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "np.load without allow_pickle=False": r"np\.load\((?![^)]*allow_pickle=False)",
    "shell=True": r"shell=True",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_runs_foreign_code(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [str(path) for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())]
    assert not found


def test_the_patterns_match_what_they_forbid() -> None:
    assert re.search(FORBIDDEN["torch.load without weights_only=True"], "torch.load(path)")
    assert not re.search(
        FORBIDDEN["torch.load without weights_only=True"], "torch.load(p, weights_only=True)"
    )
    assert re.search(FORBIDDEN["eval"], "x = eval(text)")
    assert not re.search(FORBIDDEN["eval"], "model.eval()")
