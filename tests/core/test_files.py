import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from weightsmith.core import files
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.files import (
    check_plain_name,
    check_target,
    folder_atomically,
    remove_leftovers,
    say_where_link_leads,
    temporary_folder,
    write_atomically,
)


def fill(target, content):
    with folder_atomically(target) as fresh:
        (fresh / "a").write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(body, folder):
    """Run Python statements in a process that ends as by SIGKILL, with no clean-up."""
    code = "import os, signal\nfrom pathlib import Path\nfrom weightsmith.core import files\n" + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ)
    assert done.returncode == -signal.SIGKILL


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_written_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "x")
        fill(tmp_path / "folder", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_an_error_inside_the_block_leaves_the_folder_as_it_was(tmp_path):
    target = tmp_path / "folder"
    fill(target, "old")
    with pytest.raises(RuntimeError), folder_atomically(target) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError("stop")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_existing_folder_or_file_is_replaced_as_a_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "folder"
    target.write_text("a file")
    for content in ("old", "new"):
        fill(target, content)
        assert (target / "a").read_text() == content
        assert names(tmp_path) == ["folder"]


def test_two_folders_change_places_in_one_step(tmp_path):
    for name in ("one", "other"):
        fill(tmp_path / name, name)
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("the file system cannot")
    assert (tmp_path / "one" / "a").read_text() == "other"
    with pytest.raises(OSError, match="No such file"):
        files._exchange(tmp_path / "missing", tmp_path / "one")


def test_without_that_a_failure_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "folder"
    fill(target, "old")
    rename = type(target).rename

    def failing(self, to):
        if to == target and self.name == target.name:
            raise OSError(errno.EIO, "broken")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(OSError, match="broken"):
        fill(target, "new")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_without_that_the_next_write_puts_back_what_a_kill_has_moved_away(tmp_path):
    target = tmp_path / "folder"
    fill(target, "old")
    killed(
        f"""
        files._exchange = lambda one, other: False
        rename = Path.rename
        def once(self, to):
            rename(self, to)
            {KILL}
        Path.rename = once
        with files.folder_atomically(Path("folder")) as fresh:
            (fresh / "a").write_text("new")
        """,
        tmp_path,
    )
    assert not target.exists()
    with pytest.raises(RuntimeError), folder_atomically(target):
        assert (target / "a").read_text() == "old"
        raise RuntimeError("stop")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_the_next_write_removes_what_killed_writes_have_left(tmp_path):
    killed(
        f"""
        with files.folder_atomically(Path("out")) as fresh, files.folder_atomically(fresh) as nested:
            (nested / "a").write_text("half")
            {KILL}
        """,
        tmp_path,
    )
    killed(f"with files.temporary_folder(Path('other')):\n    {KILL}", tmp_path)
    assert len(names(tmp_path)) == 2
    fill(tmp_path / "out", "new")
    assert len(names(tmp_path)) == 2  # of another target: not touched
    (tmp_path / ".mine.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine.tmp", "out"]


def test_what_a_live_process_writes_is_no_leftover(tmp_path):
    with temporary_folder(tmp_path / "out") as mine:
        with temporary_folder(tmp_path / "out") as other:
            remove_leftovers(tmp_path)
            assert mine.is_dir()
            assert other.is_dir()
        assert names(tmp_path) == [mine.name]
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_written_to_and_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda folder: None)
    (tmp_path / ".out.aaaaaaaa.tmp").mkdir()
    fill(tmp_path / "out", "new")
    assert names(tmp_path) == [".out.aaaaaaaa.tmp", "out"]


def test_leftovers_are_only_folders_and_no_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / ".out.aaaaaaaa.tmp").symlink_to(tmp_path / "kept")
    (tmp_path / ".out.bbbbbbbb.tmp").write_text("x")
    before = names(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == before


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real)
    for content in ("one", "two"):
        fill(link, content)
        assert link.is_symlink()
        assert (real / "a").read_text() == content
    assert names(tmp_path / "disk") == ["real"]


def test_a_target_that_cannot_be_written_leaves_no_litter(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file" / "below", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_target_is_nothing_that_is_read(tmp_path):
    source = tmp_path / "in" / "model"
    source.mkdir(parents=True)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "b").write_text("x")
    (source / "weights").symlink_to(blobs / "b")
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "in", source / "new", tmp_path / "link", blobs, tmp_path / "in" / ".." / "in"):
        with pytest.raises(UsageError, match=r"out must be neither in, around nor equal"):
            check_target(out, [source])
    with pytest.raises(UsageError, match=r"^folder must be"):
        check_target(tmp_path, [tmp_path / "text.jsonl"], argument="folder")
    check_target(tmp_path / "in" / "model-2", [source, tmp_path / "text.jsonl"])


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "c:x", "a\0", "a\n", "x" * 256])
def test_a_name_out_of_a_file_is_plain(name):
    with pytest.raises(UsageError, match=r"index.json names the file .*; it must be a plain file name"):
        check_plain_name(name, "index.json")


def test_plain_names_are_passed_on():
    for name in ("model-00001-of-00002.safetensors", "é.bin", "..a", "a b"):
        assert check_plain_name(name, "index.json") == name


def test_a_link_out_of_its_folder_is_said_except_in_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    (snapshot / "deep").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ff").write_text("x")
    (snapshot / "model").symlink_to("../../blobs/ff")
    (snapshot / "deep" / "model").symlink_to("../../../blobs/ff")
    (snapshot / "inside").symlink_to("deep/model")
    (tmp_path / "secret").write_text("x")
    (snapshot / "out").symlink_to(tmp_path / "secret")
    for name in ("model", "deep/model", "inside"):
        say_where_link_leads(snapshot / name)
    with pytest.warns(WeightsmithWarning, match=rf"out is a link out of its folder, to {tmp_path}/secret"):
        say_where_link_leads(snapshot / "out")
