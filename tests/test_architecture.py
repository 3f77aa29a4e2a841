"""The arrows between the rooms, read from the imports of every file.

cli -> poc, study -> report, arena, adopt, bench -> nn, parallel -> core, downward only. The checker is
tested on small trees that break each rule.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "maclin"
FLOOR = {
    "core": 0,
    "nn": 1,
    "parallel": 1,
    "training": 1,
    "report": 2,
    "adopt": 2,
    "bench": 2,
    "arena": 3,
    "poc": 3,
    "study": 3,
    "cli": 4,
}
FOR_ALL = {"records", "progress", "files", "_version"}  # imported by all, import nothing of ours
ABOVE_ALL = {"", "__main__", "testing"}  # the front door and the conformance checks; only the command may enter there
HOST_LIBRARIES = {"transformers", "sentence_transformers", "timm"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute
    line: int
    at_load: bool  # executed when the file is imported: not in a function, not for type checkers only


def module_name(root: Path, path: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def load(root: Path) -> dict[str, list[Import]]:
    """The imports of every module of the package at ``root``, by the module's dotted name."""
    paths = {module_name(root, path): path for path in sorted(root.rglob("*.py"))}
    return {name: list(imports_of(name, path, set(paths))) for name, path in paths.items()}


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, at_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_load and child in node.orelse)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_load and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def violations(root: Path) -> list[str]:
    """Every broken rule, as ``module:line: what is wrong``."""
    imports = load(root)
    top = root.name
    found = []
    for name, items in imports.items():
        room = name.removeprefix(top).lstrip(".").split(".")[0]
        if room not in FLOOR and room not in FOR_ALL | ABOVE_ALL:
            found.append(f"{name}:1: no such room in the house; give {room!r} a floor in the table of this test")
            continue
        for item in items:
            wrong = wrong_import(name, room, item.module, top)
            if wrong:
                found.append(f"{name}:{item.line}: {wrong}")
    found.extend(f"{cycle[0]}:1: a cycle of imports: {' -> '.join(cycle)}" for cycle in cycles(imports))
    return found


def wrong_import(name: str, room: str, module: str, top: str) -> str | None:
    library = module.split(".")[0]
    if library != top:
        if library in HOST_LIBRARIES and not name.startswith(f"{top}.adopt.hosts."):
            return f"only adopt/hosts/* may import {library}"
        if library == "torch" and room in {"report", *FOR_ALL}:
            return f"{room} imports no torch"
        return None
    if room in ABOVE_ALL:
        return None
    target = module.removeprefix(top).lstrip(".").split(".")[0]
    if room in FOR_ALL:
        if target == room:
            return None
        return f"{room} imports nothing of ours, and this imports {module}"
    if target in FOR_ALL:
        return None
    if target in ABOVE_ALL:
        return None if room == "cli" else f"{room} imports {module}, which stands above every room"
    if target not in FLOOR:
        return f"{room} imports {module}, which is in no room"
    if room == "report" and target != "report":
        return f"report imports no torch, and {module} stands on it"
    if target != room and FLOOR[target] >= FLOOR[room]:
        return f"{room} imports {target}, and imports go downward only"
    mechanisms = f"{top}.core.mechanisms."
    if is_mechanism(name, mechanisms) and is_mechanism(module, mechanisms) and module != name:
        return f"a mechanism's file imports another's, {module}; compose instances in core/compose.py"
    return None


def is_mechanism(module: str, prefix: str) -> bool:
    file = module.removeprefix(prefix)
    return module.startswith(prefix) and file != "base" and not file.startswith("_")


def cycles(imports: dict[str, list[Import]]) -> list[list[str]]:
    """Cycles among the imports that run when a file is imported; each as its modules, closed."""
    graph = {
        name: sorted({i.module for i in items if i.at_load and i.module in imports and i.module != name})
        for name, items in imports.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in graph[name]:
                walk(target, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def test_the_house_holds() -> None:
    assert not violations(ROOT), "\n".join(violations(ROOT))


def build(tmp_path: Path, files: dict[str, str]) -> Path:
    root = tmp_path / "maclin"
    for file, text in {"__init__.py": "", **files}.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    root = build(
        tmp_path,
        {
            "__init__.py": "from maclin.core.contract import accumulate\nfrom maclin import bench\n",
            "records/__init__.py": "from .codec import to_json\n",
            "records/codec.py": "import json\n",
            "testing.py": "from maclin import poc, core\n",
            "core/__init__.py": "from maclin.core.contract import accumulate\n",
            "core/contract.py": "import torch\ndef accumulate(): from maclin.core import late\n",
            "core/late.py": "from maclin.core.contract import accumulate\n",
            "core/mechanisms/__init__.py": "from . import base, efficient\n",
            "core/mechanisms/base.py": "",
            "core/mechanisms/efficient.py": "from .base import x\nfrom ..contract import accumulate\n",
            "core/mechanisms/_shared.py": "from maclin.core.mechanisms.base import x\n",
            "core/mechanisms/linformer.py": "from maclin.core.mechanisms import _shared\n",
            "nn/__init__.py": "from maclin.core import contract\n",
            "bench/__init__.py": "from maclin.records import Timing\nfrom ..core.contract import accumulate\n",
            "adopt/__init__.py": "from maclin import nn\n",
            "adopt/hosts/__init__.py": "",
            "adopt/hosts/bert.py": "import transformers.models\nfrom maclin.adopt import plan\n",
            "adopt/plan.py": "if TYPE_CHECKING:\n    from maclin.adopt.hosts import bert\n",
            "report/__init__.py": "import jinja2\nfrom maclin import records\nfrom .words import say\n",
            "report/words.py": "",
            "poc/__init__.py": "from maclin import adopt, bench, report\n",
            "cli/__init__.py": "from maclin.poc import run\nfrom maclin._version import __version__\n",
            "cli/app.py": "import maclin",
            "_version.py": "",
        },
    )
    assert violations(root) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"core/a.py": "from maclin.bench import timing"}, "downward only"),
        ({"core/a.py": "def f():\n    import maclin.nn.layers"}, "downward only"),
        ({"core/a.py": "from ..adopt import plan"}, "downward only"),
        ({"core/mechanisms/a.py": "from ...bench import timing"}, "downward only"),
        ({"adopt/a.py": "from maclin.bench import timing"}, "downward only"),
        ({"nn/a.py": "import maclin.parallel"}, "downward only"),
        ({"core/a.py": "if TYPE_CHECKING:\n    from maclin.poc import run"}, "downward only"),
        ({"bench/a.py": "import maclin"}, "above every room"),
        ({"bench/a.py": "from maclin import attention"}, "above every room"),
        ({"bench/a.py": "from maclin.testing import check"}, "above every room"),
        ({"attic/a.py": ""}, "no such room"),
        ({"bench/a.py": "from maclin.attic import box"}, "in no room"),
        ({"records.py": "from maclin._version import __version__"}, "nothing of ours"),
        ({"records.py": "import torch"}, "no torch"),
        ({"records/a.py": "import torch"}, "no torch"),
        ({"records/a.py": "from ..core import kernels"}, "nothing of ours"),
        ({"report/a.py": "from torch import Tensor"}, "no torch"),
        ({"report/a.py": "def f():\n    import torch.nn"}, "no torch"),
        ({"report/a.py": "from maclin.core import kernels"}, "no torch"),
        ({"poc/a.py": "import transformers"}, "only adopt/hosts/*"),
        ({"adopt/a.py": "from transformers.models import bert"}, "only adopt/hosts/*"),
        ({"cli/a.py": "def f():\n    import sentence_transformers"}, "only adopt/hosts/*"),
        ({"adopt/hosts.py": "import timm"}, "only adopt/hosts/*"),
        (
            {"core/mechanisms/a.py": "from maclin.core.mechanisms import b", "core/mechanisms/b.py": ""},
            "another's, maclin.core.mechanisms.b",
        ),
        ({"core/mechanisms/a.py": "from .b import B", "core/mechanisms/b.py": ""}, "another's"),
        ({"core/a.py": "from maclin.core import b", "core/b.py": "import maclin.core.a"}, "a -> maclin.core.b -> "),
        ({"core/__init__.py": "from .a import x", "core/a.py": "from maclin.core import y"}, "cycle"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, files: dict[str, str], message: str) -> None:
    found = violations(build(tmp_path, files))
    assert len(found) == 1, found
    assert message in found[0]
