"""Files are whole or not there, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.files import (
    atomic_folder,
    atomic_path,
    explain_os_error,
    json_text,
    remove_leftovers,
    safe_name,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_text,
)


def left_over(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith("."))


def stop_midway(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


class TestAtomicPath:
    def test_it_appears_whole_with_its_folders(self, tmp_path: Path) -> None:
        target = tmp_path / "a" / "b.nii.gz"
        with atomic_path(target) as temporary:
            temporary.write_text("whole")
            assert temporary.name.endswith("b.nii.gz")
            assert temporary.parent == target.parent
            assert not target.exists()
        assert target.read_text() == "whole"
        assert left_over(tmp_path) == []

    def test_an_error_leaves_what_was_there(self, tmp_path: Path) -> None:
        target = tmp_path / "a.txt"
        target.write_text("before")
        with pytest.raises(ZeroDivisionError):
            stop_midway(target, ZeroDivisionError())
        assert target.read_text() == "before"
        assert left_over(tmp_path) == []

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            stop_midway(tmp_path / "a.txt", KeyboardInterrupt())
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way_of_a_folder_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        with pytest.raises(RunError, match=r"^cannot write .*out/a.txt: a file stands where a folder is needed"):
            write_text(tmp_path / "out" / "a.txt", "x")

    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("x")
        write_text(tmp_path / "ours", "x")
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
        assert len(modes) == 1

    def test_a_device_or_a_pipe_is_written_and_never_replaced(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        write_text(pipe, "through")
        assert os.read(reader, 100) == b"through"
        os.close(reader)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        device = Path("/dev/full").stat()
        with pytest.raises(RunError, match=r"^cannot write /dev/full: the disk is full"):
            write_text(Path("/dev/full"), "x")
        assert os.path.samestat(device, Path("/dev/full").stat())

    def test_a_device_that_is_full_is_one_line(self, tmp_path: Path) -> None:
        with (
            pytest.raises(RunError, match="the disk is full; free some space"),
            atomic_path(tmp_path / "a") as temporary,
        ):
            Path("/dev/full").write_text("x")
        assert not temporary.exists()
        assert list(tmp_path.iterdir()) == []


class TestAtomicFolder:
    def test_it_appears_whole(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "bundle") as temporary:
            (temporary / "a").write_text("1")
            assert not (tmp_path / "bundle").exists()
        assert (tmp_path / "bundle" / "a").read_text() == "1"
        assert left_over(tmp_path) == []

    def test_one_that_is_there_is_kept_unless_forced(self, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "old").write_text("1")
        with pytest.raises(RunError, match="exists already; give --force"), atomic_folder(tmp_path / "bundle"):
            pytest.fail("never entered")
        with atomic_folder(tmp_path / "bundle", force=True) as temporary:
            (temporary / "new").write_text("2")
        assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["new"]

    def test_an_error_leaves_the_old_one(self, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "old").write_text("1")
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "bundle", force=True):
            raise ZeroDivisionError
        assert (tmp_path / "bundle" / "old").exists()
        assert left_over(tmp_path) == []

    def test_permissions_are_those_of_any_new_folder(self, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        with atomic_folder(tmp_path / "ours"):
            pass
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
        assert len(modes) == 1


class TestHashes:
    def test_a_file_by_its_bytes(self, tmp_path: Path) -> None:
        content = os.urandom(3_000_000)
        (tmp_path / "a").write_bytes(content)
        assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()

    def test_json_whatever_the_order_of_its_keys(self) -> None:
        assert sha256_of_json({"a": 1, "b": [1, 2]}) == sha256_of_json({"b": [1, 2], "a": 1})
        assert sha256_of_json({"a": 1, "b": [1, 2]}) != sha256_of_json({"a": 1, "b": [2, 1]})

    def test_json_is_written_in_the_order_given(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"b": "ö", "a": 1})
        text = (tmp_path / "a.json").read_text(encoding="utf-8")
        assert text == '{\n  "b": "ö",\n  "a": 1\n}\n'
        assert json.loads(text) == {"b": "ö", "a": 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("case_001", "case_001"),
        ("a b/c", "a_b_c"),
        ("../../etc/passwd", "_.._etc_passwd"),
        (".hidden", "hidden"),
        ("", "unnamed"),
        ("...", "unnamed"),
        ("Müller", "M_ller"),
    ],
)
def test_names_cannot_leave_their_folder(text: str, name: str) -> None:
    assert safe_name(text) == name


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "the folder cannot be written"),
        (errno.EFBIG, "file too large"),
        (errno.EIO, "input/output error"),
    ],
)
def test_what_the_system_refuses_is_one_line_that_says_what_to_do(code: int, says: str) -> None:
    message = str(explain_os_error(OSError(code, os.strerror(code)), Path("out/a.nii")))
    assert message.startswith("cannot write out/a.nii: ")
    assert says in message
    assert "\n" not in message


class TestLeftovers:
    def test_what_no_running_process_writes_goes(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        for process in (ended.pid, os.getpid(), "abc"):
            (tmp_path / f".writing-{process}-x.nii.gz").touch()
            (tmp_path / f".writing-{process}-folder").mkdir()
        remove_leftovers(tmp_path)
        assert left_over(tmp_path) == []

    def test_what_a_running_process_writes_stays(self, tmp_path: Path) -> None:
        other = tmp_path / f".writing-{os.getppid()}-x.nii.gz"
        other.touch()
        with atomic_path(tmp_path / "a.txt") as file, atomic_folder(tmp_path / "folder") as folder:
            file.write_text("whole")
            (folder / "b.txt").write_text("whole")
            remove_leftovers(tmp_path)
        assert (tmp_path / "a.txt").exists()
        assert (tmp_path / "folder" / "b.txt").exists()
        assert left_over(tmp_path) == [other.name]

    def test_what_may_not_be_removed_is_no_matter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another user's, in a folder in which each may remove only their own."""

        def refused(path: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

        (tmp_path / ".writing-abc-x").touch()
        monkeypatch.setattr(Path, "unlink", refused)
        remove_leftovers(tmp_path)


def test_names_of_files_that_are_no_utf_8_are_kept_in_json(tmp_path: Path) -> None:
    value = {"paths": [os.fsdecode(b"\xfc.dcm"), "ü.dcm"]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    assert sha256_of_json(value) != sha256_of_json({"paths": ["?.dcm", "ü.dcm"]})
    assert json_text({"name": "ü"}) == '{"name": "ü"}'
