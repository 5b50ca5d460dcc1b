import pytest

from weightsmith.core.files import folder_atomically, write_atomically


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_inside_the_block_leaves_the_folder_as_it_was(tmp_path):
    target = tmp_path / "folder"
    with folder_atomically(target) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError), folder_atomically(target) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError("stop")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_cannot_be_written_leaves_no_litter(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file" / "below", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
