"""Folders that one process works in at a time, and what is said when a disk is full."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from statex.errors import UserError
from statex.utils import atomic
from statex.utils.atomic import name_full_disk, new_folder, working_in
from tiny_recipe import environment

HOLD = """
import sys, time
from pathlib import Path
from statex.utils.atomic import working_in
with working_in(Path(sys.argv[1]), "output"):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that works in tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ends(holder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught, working_in(folder, "output"):
        pass
    assert f"output = '{folder}': another process works in it (process {holder.pid} on " in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with working_in(folder, "output"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_is_the_same_by_any_path(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    with working_in(tmp_path / "run", "output"):
        for path in (Path("."), Path("../run"), tmp_path / "other"):
            with pytest.raises(UserError, match="another process works in it"), working_in(path, "output"):
                pass


def test_only_what_was_written_stays(tmp_path):
    with working_in(tmp_path / "a" / "b" / "run", "output"):
        pass
    assert not list(tmp_path.iterdir())
    with working_in(tmp_path / "a" / "b" / "run", "output"):
        (tmp_path / "a" / "note").write_text("mine")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "a/note"]
    with pytest.raises(ZeroDivisionError), working_in(tmp_path / "run", "output"), new_folder(tmp_path / "run"):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_not_a_folder_to_work_in(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"output = .*is not a folder"), working_in(tmp_path / "run", "output"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_lock_lies_inside_where_the_parent_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    (tmp_path / "disk").mkdir()
    with working_in(tmp_path / "disk", "output"):
        assert [path.name for path in tmp_path.rglob("*")] == ["disk", ".disk.lock"]
        with pytest.raises(UserError, match="another process works in it"), working_in(tmp_path / "disk", "output"):
            pass


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("statex.utils.atomic.fcntl.flock", refuse)
    with working_in(tmp_path / "run", "output"):
        pass
    assert "this file system has no locks; start no second process" in caplog.text


@pytest.mark.parametrize("name", ["file/run", "nul\0/run", "x" * 300])
def test_a_folder_that_cannot_be_is_the_user_s_mistake(tmp_path, name):
    (tmp_path / "file").write_text("")
    message = r"output = .*: cannot be written to \(.+\); use another folder"
    with pytest.raises(UserError, match=message), working_in(tmp_path / name, "output"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL = {
    "the system": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a file of the folder": OSError(errno.ENOSPC, "No space left on device", "run/a/b"),
    "pyarrow": OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 12800 vs 12692"),
    "torch's writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "torch's stream": RuntimeError("basic_ios::clear: iostream error"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_reported_with_its_folder(kind):
    of_parent, of_worker = name_full_disk(Path("run")), name_full_disk(Path("run"))
    with pytest.raises(OSError) as caught, of_parent, of_worker:
        raise FULL[kind]
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "run")
    if kind in ("a quota", "torch"):
        assert caught.value.strerror in str(FULL[kind])


def test_a_full_disk_elsewhere_is_reported_with_that_folder():
    with pytest.raises(OSError) as caught, name_full_disk(Path("run")):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache/file")
    assert caught.value.filename == "/tmp/cache"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), PermissionError(errno.EACCES, "Permission denied")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, name_full_disk(Path("run")):
        raise error
    assert caught.value is error


def test_waiting_is_told_once_however_many_hold_the_lock_in_turn(tmp_path, monkeypatch, caplog):
    """Of several processes that wait, each removes the file as it ends, so the next finds a lock that is gone."""
    path, taken = tmp_path / ".run.lock", []

    def flock(descriptor, how):
        if how & fcntl.LOCK_NB and len(taken) < 3:
            raise BlockingIOError
        if not how & fcntl.LOCK_NB:
            taken.append(descriptor)
            path.unlink()  # as the process that held it

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with caplog.at_level("WARNING"), atomic.locked(tmp_path / "run", "data.tokens", wait=True):
        assert len(taken) == 3
    assert caplog.text.count("waiting for") == 1
    assert str(path) in caplog.text
