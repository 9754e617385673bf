"""Hard bounds behind the habits: code is meant to stay far below them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("transforms", "pipeline", "tests", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
)
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 500
EMPTY_NAMES = {"base", "common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def function_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring and the decorators."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def long_functions(source: str) -> dict[str, int]:
    """The functions of `source` that pass the bound, as name:line, with their lengths."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    lengths = {f"{function.name}:{function.lineno}": function_lines(function) for function in functions}
    return {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path: Path) -> None:
    assert long_functions(path.read_text(encoding="utf-8")) == {}


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_FILE_LINES} == {}


def test_names_say_what_is_inside() -> None:
    names = [relative(path) for path in FILES if EMPTY_NAMES & {path.stem, path.parent.name}]
    assert names == []


@pytest.mark.parametrize(("statements", "expected"), [(59, {}), (60, {"f:1": 61})])
def test_a_docstring_does_not_count(statements: int, expected: dict[str, int]) -> None:
    source = 'def f():\n    """One\n    two."""\n' + "    pass\n" * statements
    assert long_functions(source) == expected
