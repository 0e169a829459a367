"""The output's place: tested before the work, written to without loss, whatever it is."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from surgery.errors import CheckpointError
from surgery.runtime.files import CAUSES, as_os_error
from surgery.saving.folder import REPORT, check_room, check_target, kept_beside, whole_folder


def write(out, text="new"):
    with whole_folder(check_target(out, overwrite=True)) as place:
        (place / REPORT).write_text(text)
        (place / "inside").mkdir()
        (place / "inside" / "file").write_text(text)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def is_whole(out, text="new"):
    return names(out) == ["inside", REPORT] and (out / "inside" / "file").read_text() == text


@pytest.fixture
def mounted(monkeypatch):
    """Makes folders mount points, to those who ask."""
    points = set()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in points)
    return points.add


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    for link, real in ((tmp_path / "link", tmp_path / "real"), (tmp_path / "dangling", tmp_path / "later")):
        link.symlink_to(real)
        for text in ("new", "newer"):
            write(link, text)
            assert link.is_symlink() and is_whole(real, text)
    assert names(tmp_path) == ["dangling", "later", "link", "real"]


def test_a_mount_point_is_written_inside(tmp_path, mounted):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    mounted(out)
    assert kept_beside(out, "partial") == out / ".surgery.partial"
    kept_beside(out, "partial").mkdir()
    for text in ("new", "newer"):
        write(out, text)
        assert names(out) == [".surgery.partial", "inside", "lost+found", REPORT]
        assert (out / "inside" / "file").read_text() == text
    assert names(tmp_path) == ["out"]
    with pytest.raises(CheckpointError, match="already holds a twin"):
        check_target(out, overwrite=False)
    (out / REPORT).unlink()
    with pytest.raises(CheckpointError, match="not made by this tool"):
        check_target(out, overwrite=True)


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """A mount of a folder of the same file system looks like any other until it is renamed."""
    out, rename = tmp_path / "out", os.rename
    write(out, "old")

    def busy(source, target):
        if Path(source) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    write(out)
    assert is_whole(out) and names(tmp_path) == ["out"]


def test_an_earlier_twin_is_not_lost_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    write(out, "old")

    def failing(source, target):
        if Path(target) == out and not Path(source).name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output"):
        write(out)
    assert is_whole(out, "old") and names(tmp_path) == ["out"]


@pytest.mark.parametrize(("flag", "cause"), [(os.ST_RDONLY, "read-only"), (0, "no permission")])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(flag, cause, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there", tmp_path / "new", tmp_path / "far" / "new"):
        with pytest.raises(CheckpointError, match=cause):
            check_target(out, overwrite=False)


def test_an_output_in_a_folder_that_is_not_ours_is_written_inside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    write(out)
    assert is_whole(out) and kept_beside(out, "partial").parent == out


@pytest.mark.parametrize("number", sorted(CAUSES))
def test_the_cause_named_is_the_one_the_system_gave(number, tmp_path):
    with pytest.raises(CheckpointError) as refused, whole_folder(tmp_path / "out"):
        raise as_os_error(RuntimeError(f"I/O error: something (os error {number})"))
    assert refused.value.cause == CAUSES[number][0] and os.strerror(number) in refused.value.what
    assert "disk is full" not in str(refused.value) or number == errno.ENOSPC
    with pytest.raises(CheckpointError) as refused, whole_folder(tmp_path / "out"):
        raise as_os_error(RuntimeError("shared tensors"))
    assert not refused.value.cause
    assert names(tmp_path) == []


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    model = nn.Linear(1024, 1024, bias=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    check_room(tmp_path / "far" / "out", model, "bfloat16")
    with pytest.raises(CheckpointError, match=r"0\.00 GiB are free"):
        check_room(tmp_path / "far" / "out", model, "float32")


def test_files_follow_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out") as place:
            (place / "file").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o640


HELD = """
import sys, time
from pathlib import Path
from surgery.saving.folder import whole_folder
with whole_folder(Path(sys.argv[1])) as place:
    (place / "weights").write_bytes(b"x" * 100)
    print("inside", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_removed_by_the_next_but_not_what_another_writes(tmp_path):
    command = [sys.executable, "-c", HELD, str(tmp_path / "out")]
    killed, living = (subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2))
    try:
        for process in (killed, living):
            assert process.stdout.readline() == b"inside\n"
        killed.kill()
        killed.wait()
        assert len(names(tmp_path)) == 2
        write(tmp_path / "out")
        assert len(names(tmp_path)) == 2 and is_whole(tmp_path / "out")
    finally:
        living.kill()
        living.wait()
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


TERMINATED = """
import sys, time
import click
from surgery.cli import main
from surgery.saving import folder

@main.cli.command()
@click.argument("out")
def wait(out):
    with folder.whole_folder(folder.Path(out)) as place:
        (place / "weights").write_bytes(b"x")
        print("inside", flush=True)
        time.sleep(60)

sys.argv = ["surgery", "wait", sys.argv[1]]
main.main()
"""


def test_a_terminated_command_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143 and "run the same command" in said and "Traceback" not in said
    assert names(tmp_path) == []


def test_an_error_of_the_system_that_nobody_foresaw_has_its_cause_too(tmp_path):
    full = TERMINATED.replace("time.sleep(60)", "").replace(
        "with folder.whole_folder", "raise OSError(28, 'No space left on device', out)\n    with folder.whole_folder"
    )
    done = subprocess.run(
        [sys.executable, "-c", full, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "the disk is full" in done.stderr and str(tmp_path) in done.stderr
