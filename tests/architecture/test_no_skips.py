"""`--no-skips` turns every kind of skip into a failure, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"

TESTS = """
import pytest

def test_that_passes():
    pass

def test_that_skips_itself():
    pytest.skip("skipped in the test")

@pytest.mark.skip(reason="skipped by a mark")
def test_that_is_marked():
    pass

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""
SKIPPED_MODULE = """
import pytest

pytest.importorskip("no_such_module")
"""


def test_each_skip_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (tmp_path / "test_cases.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "test_module.py").write_text(SKIPPED_MODULE, encoding="utf-8")
    options = ["--no-skips", "--continue-on-collection-errors", "-p", "no:cacheprovider", "--rootdir=."]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "1 failed, 1 passed, 1 xfailed, 2 errors" in run.stdout
    for reason in ("skipped in the test", "skipped by a mark", "no_such_module"):
        assert reason in run.stdout
