"""Commits of real git repositories; tags without a trace of the user or the machine's name."""

from __future__ import annotations

import getpass
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.provenance import git_commit, provenance_tags


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit of one file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "file.txt").write_text("committed", encoding="utf-8")
    for command in ("init", "add file.txt", "-c user.name=a -c user.email=a@b commit --message m"):
        subprocess.run(["git", "-C", str(folder), *command.split()], check=True, capture_output=True)
    return folder


def test_the_commit_says_whether_files_differ_from_it(repository: Path) -> None:
    commit = git_commit(repository)
    head = (repository / ".git").rglob("refs/heads/*")
    assert commit == next(iter(head)).read_text(encoding="utf-8").strip()
    (repository / "new.txt").touch()
    assert git_commit(repository) == commit
    (repository / "file.txt").write_text("changed", encoding="utf-8")
    assert git_commit(repository) == f"{commit}-dirty"


def test_an_installed_package_has_no_commit(repository: Path) -> None:
    """Not even inside someone else's repository, nor where the repository is broken."""
    (repository / "site-packages").mkdir()
    assert git_commit(repository / "site-packages") is None
    shutil.rmtree(repository / ".git" / "refs")
    assert git_commit(repository) is None


def test_tags_say_what_ran_and_not_who_ran_it() -> None:
    tags = provenance_tags()
    assert tags["volseg"] == version("volseg")
    assert tags["torch"] == version("torch")
    assert tags["python"] == platform.python_version()
    told = " ".join(tags.values()).split()
    assert getpass.getuser() not in told
    assert platform.node() not in told
