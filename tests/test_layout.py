"""The rooms of docs/architecture.md: imports run down only, commands at the top, short files and functions."""

import ast
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "finetune.py",
    "grpo.py",
    "pretrain.py",
    "test.py",
    "test_ddp.py",
    "recommend.py",
    "serve.py",
    "report.py",
    "demo.py",
}


@pytest.fixture(scope="module")
def modules():
    """Module name -> its tree, without the tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [Path(file) for file in listed.stdout.split() if not file.startswith("tests/") and (ROOT / file).exists()]
    return {file: ast.parse((ROOT / file).read_text()) for file in files}


def room_of(file: Path) -> str:
    return str(file.parent) if file.parent != Path(".") else file.name


def imports_between_rooms(modules) -> dict[str, set[str]]:
    """Room -> the rooms it imports from; a command is a room of its own."""
    files = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in modules}
    imports = defaultdict(set)
    for file, tree in modules.items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        rooms = {room_of(files[name]) for name in names if name in files and name != "reclingua"}
        imports[room_of(file)] |= rooms - {room_of(file), "reclingua"}
    return imports


def test_imports_run_down_only(modules):
    imports = imports_between_rooms(modules)
    open_rooms = []

    @cache
    def floor(room: str) -> int:
        assert room not in open_rooms, f"imports in a circle: {' -> '.join([*open_rooms, room])}"
        open_rooms.append(room)
        height = 1 + max(map(floor, sorted(imports[room])), default=0)
        open_rooms.remove(room)
        return height

    assert max(map(floor, sorted(imports))) <= 8
    assert sum(map(len, imports.values())) <= 90
    library = {room: below for room, below in imports.items() if room.startswith("reclingua")}
    outside = {room: below for room, below in library.items() if not all(r.startswith("reclingua") for r in below)}
    assert not outside, "the library imports from outside"


def test_the_top_holds_commands_alone(modules):
    assert {file.name for file in modules if file.parent == Path(".")} == COMMANDS


def test_files_and_functions_are_short(modules):
    long_files = {str(file) for file in modules if len((ROOT / file).read_text().splitlines()) > 400}
    functions = {
        f"{file}: {node.name}"
        for file, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    }
    assert not long_files and not functions
