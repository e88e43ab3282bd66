"""The house rules of DESIGN section 4 that can be read off the source: who imports whom, who may touch what, how long a file is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megastab"
ORDER = (
    "config",
    "parallel",
    "wrappers",
    "data",
    "model",
    "optim",
    "stability",
    "telemetry",
    "checkpoint",
    "engine",
    "plan",
    "report",
    "analysis",
    "pretrain",
)
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Modules under deepspeed.runtime that DeepSpeed's own documentation tells users to import from.
PUBLIC_DEEPSPEED = {
    "deepspeed.runtime.pipe",
    "deepspeed.runtime.pipe.module",
    "deepspeed.runtime.pipe.topology",
    "deepspeed.runtime.zero",
}

Import = tuple[int, str]


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """(line, dotted module) of every import in a file, those inside functions included."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), path))


def _imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = path.relative_to(PACKAGE.parent).parts[: -node.level]
                module = ".".join([*above, *([module] if module else [])])
            # `from megastab import data` names a room, `from torch import distributed` a module.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room_of_file(path: Path) -> str | None:
    """The room a file stands in; None for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return None if first == "__init__.py" else first.removesuffix(".py")


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "megastab" and len(parts) > 1 else None


def wrong_rooms(path: Path) -> list[str]:
    """Imports of a room to the right."""
    room, problems = room_of_file(path), []
    if room is None:
        return []  # the package's lazy front door knows every room
    for line, module in imports(path):
        other = room_of_module(module)
        if other in ORDER and ORDER.index(other) > ORDER.index(room):
            problems.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {room} imports {module}, which is to its right")
    return problems


def wrong_importers(path: Path) -> list[str]:
    """torch.distributed outside parallel/collectives.py, DeepSpeed's inside outside wrappers/, anything heavy in config/."""
    here, problems = path.relative_to(PACKAGE), []
    for line, module in imports(path):
        where = f"megastab/{here}:{line}: {module}"
        if _under(module, "torch.distributed") and here.as_posix() != "parallel/collectives.py":
            problems.append(f"{where} is imported outside parallel/collectives.py")
        if _under(module, "deepspeed.runtime") and here.parts[0] != "wrappers" and not _is_public(module):
            problems.append(f"{where} is DeepSpeed's inside, imported outside wrappers/")
        if here.parts[0] == "config" and module.split(".")[0] in ("torch", "deepspeed", "megatron", "numpy"):
            problems.append(f"{where} is imported in config/, which must load within a second")
    return problems


def _under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _is_public(module: str) -> bool:
    """A public module itself, or a name in it."""
    return module in PUBLIC_DEEPSPEED or module.rpartition(".")[0] in PUBLIC_DEEPSPEED


def literal_devices(source: str) -> list[int]:
    """Lines of code that name the device: "cuda", "cuda:0" or .cuda(...). Docstrings and comments may."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    lines = []
    for node in ast.walk(tree):
        is_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"cuda(:\d+)?", node.value)
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        if (is_name and id(node) not in docstrings) or is_call:
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_keeps_the_house_rules(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    problems = wrong_rooms(path) + wrong_importers(path)
    problems += [f"line {line} names the device: use deepspeed.accelerator" for line in literal_devices(source)]
    if (length := len(source.splitlines())) > MAX_LINES:
        problems.append(f"{length} lines, more than {MAX_LINES}")
    if not source.isascii():
        problems.append("not ASCII")
    if not ast.get_docstring(ast.parse(source)):
        problems.append("no module docstring")
    assert problems == []


def test_every_room_is_in_the_order() -> None:
    rooms = {room_of_file(path) for path in FILES} - {None}
    assert rooms <= set(ORDER)


def test_every_room_is_a_package() -> None:
    for room in (path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        assert (room / "__init__.py").is_file(), room.name


def test_no_file_is_named_for_nothing() -> None:
    refused = {"utils", "common", "helpers", "misc", "base", "manager"}
    assert [path for path in FILES if path.stem in refused] == []


@pytest.mark.parametrize(
    ("room", "line", "said"),
    [
        ("parallel", "from megastab.model.gpt import GPT", "to its right"),
        ("config", "import megastab.engine", "to its right"),
        ("config", "def f():\n    from ..data import blend", "to its right"),
        ("config", "from megastab import parallel", "to its right"),
        ("model", "import torch.distributed as dist", "outside parallel/collectives.py"),
        ("model", "from torch import distributed", "outside parallel/collectives.py"),
        ("engine", "from deepspeed.runtime.bf16_optimizer import BF16_Optimizer", "outside wrappers/"),
        ("config", "import torch", "must load within a second"),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, line: str, said: str) -> None:
    package = tmp_path / "megastab"
    (package / room).mkdir(parents=True)
    path = package / room / "some.py"
    path.write_text(line)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert any(said in problem for problem in wrong_rooms(path) + wrong_importers(path))


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("model", "from megastab.parallel.grid import Grid\nfrom . import block\nfrom megastab.model import rope"),
        ("engine", "from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology\nimport deepspeed"),
        ("wrappers", "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_what_is_allowed_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, line: str) -> None:
    package = tmp_path / "megastab"
    (package / room).mkdir(parents=True)
    path = package / room / "some.py"
    path.write_text(line)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert wrong_rooms(path) + wrong_importers(path) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('x.to("cuda")', [1]),
        ("x = 1\nx.cuda()", [2]),
        ('device = "cuda:1"', [1]),
        ('"""cuda"""\ny = "cuda graphs"', []),
        ("torch.backends.cuda.matmul", []),
    ],
)
def test_literal_devices_are_seen(source: str, lines: list[int]) -> None:
    assert literal_devices(source) == lines
