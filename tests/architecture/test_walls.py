"""The walls: import-linter's contracts in pyproject.toml, and what it cannot see."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("transforms/**/*.py"), *ROOT.glob("pipeline/**/*.py")])
TALKATIVE = ("pipeline/cli.py", "pipeline/cli_", "pipeline/cli/", "pipeline/demo.py")

HEAVY = (
    "highdicom",
    "lightning_fabric",
    "matplotlib",
    "mlflow",
    "monai",
    "nibabel",
    "scipy",
    "SimpleITK",
    "torch",
)
LIGHT_MODULES = (
    "pipeline.cli",
    "pipeline.config",
    "pipeline.manifest",
    "pipeline.plan",
    "pipeline.models.spec",
)

PICKLE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
GLOBAL_DRAWS = {
    "bernoulli",
    "manual_seed",
    "multinomial",
    "normal",
    "rand",
    "randint",
    "randn",
    "randperm",
    "seed",
}

Rule = Callable[[ast.AST], bool]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c, and an empty string for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def called(node: ast.AST) -> str:
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def keyword_of(node: ast.AST, name: str) -> ast.expr | None:
    return next((k.value for k in getattr(node, "keywords", []) if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def imported(node: ast.AST) -> set[str]:
    """Everything that an import statement names, `a` and `a.b` for `from a import b`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def reads_environment(node: ast.AST) -> bool:
    names = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
    return dotted(node) in names or bool(imported(node) & names)


def evaluates(node: ast.AST) -> bool:
    return called(node) in {"eval", "exec", "compile", "__import__"}


def unpickles(node: ast.AST) -> bool:
    packages = {name.split(".")[0] for name in imported(node)}
    allowed_in_array = keyword_of(node, "allow_pickle")
    return bool(packages & PICKLE_MODULES) or (
        allowed_in_array is not None and not is_constant(allowed_in_array, False)
    )


def loads_any_object(node: ast.AST) -> bool:
    if called(node) == "torch.load":
        return not is_constant(keyword_of(node, "weights_only"), True)
    return "torch.load" in imported(node)


def prints(node: ast.AST) -> bool:
    return called(node) in {"print", "sys.stdout.write", "sys.stderr.write"}


def draws_globally(node: ast.AST) -> bool:
    """A random draw, or a seeding, of the state that the whole process shares."""
    head, _, name = called(node).rpartition(".")
    if head in {"np.random", "numpy.random"}:
        return name not in {"default_rng", "Generator", "RandomState", "SeedSequence", "PCG64"}
    drawn = head in {"torch", "torch.random"} and name in GLOBAL_DRAWS
    return (drawn and keyword_of(node, "generator") is None) or "random" in imported(node)


EVERYWHERE: tuple[Rule, ...] = (reads_environment, evaluates, unpickles, loads_any_object)

BREACHES = [
    (reads_environment, "import os\nos.environ['A']"),
    (reads_environment, "from os import getenv"),
    (evaluates, "eval('1')"),
    (evaluates, "__import__('os')"),
    (unpickles, "import pickle"),
    (unpickles, "from joblib import load"),
    (unpickles, "np.load(path, allow_pickle=True)"),
    (loads_any_object, "torch.load(path)"),
    (loads_any_object, "torch.load(path, weights_only=False)"),
    (loads_any_object, "from torch import load"),
    (prints, "print('x')"),
    (draws_globally, "np.random.rand(3)"),
    (draws_globally, "torch.randn(3)"),
    (draws_globally, "torch.manual_seed(0)"),
    (draws_globally, "import random"),
]
CUSTOMS = [
    (reads_environment, "os.replace(a, b)"),
    (evaluates, "network.eval()\nre.compile('x')"),
    (unpickles, "np.load(path, allow_pickle=False)"),
    (loads_any_object, "torch.load(path, weights_only=True)"),
    (prints, "console.print('x')"),
    (draws_globally, "np.random.default_rng(0).normal(3)\ntorch.randn(3, generator=generator)"),
]


def breaches(source: str, rule: Rule) -> Iterator[int]:
    """The lines of `source` that break `rule`."""
    return (getattr(node, "lineno", 0) for node in ast.walk(ast.parse(source)) if rule(node))


def breaches_in(modules: list[Path], rule: Rule) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules
        for line in breaches(path.read_text(encoding="utf-8"), rule)
    ]


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_no_module(rule: Rule) -> None:
    assert breaches_in(MODULES, rule) == []


def test_only_the_command_line_prints() -> None:
    silent = [path for path in MODULES if not path.relative_to(ROOT).as_posix().startswith(TALKATIVE)]
    assert breaches_in(silent, prints) == []


def test_transforms_are_handed_their_generators() -> None:
    assert breaches_in([path for path in MODULES if "transforms" in path.parts], draws_globally) == []


@pytest.mark.parametrize(("rule", "source"), BREACHES)
def test_a_breach_is_seen(rule: Rule, source: str) -> None:
    assert list(breaches(source, rule))


@pytest.mark.parametrize(("rule", "source"), CUSTOMS)
def test_what_is_allowed_is_let_through(rule: Rule, source: str) -> None:
    assert not list(breaches(source, rule))


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_is_light(module: str) -> None:
    """What the command line reads at its start brings in nothing that takes long to load."""
    source = f"import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
