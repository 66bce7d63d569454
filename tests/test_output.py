"""Text on its way out: a file is the old one or the new one, and what stdout does not take is one line."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibft.errors import DataError
from ibft.evaluation.score import write
from ibft.output import to_stdout


def fails(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def contents(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders_in_utf_8_with_plain_newlines(tmp_path):
    write(tmp_path / "new" / "deep" / "file", "é\n\udcff\r\n")
    assert (tmp_path / "new" / "deep" / "file").read_bytes() == b"\xc3\xa9\n\\udcff\r\n"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_where_writing_fails_the_old_file_stays_and_nothing_else(step, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, step, fails(errno.ENOSPC))
        with pytest.raises(DataError, match=r"file: No space left on device"):
            write(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "old"}
    write(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "new"}


def test_the_old_file_is_whole_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    seen = []
    sync = os.fsync

    def fsync(number):
        seen.append((os.fstat(number).st_size, (tmp_path / "file").read_text()))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "file", "longer")
    assert seen == [(6, "old")]


def test_a_symlink_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to("there/file")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "there") == {"file": "new"}


def test_a_pipe_is_written_to_by_its_name_or_by_its_number(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    named = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    end, start = os.pipe()
    try:
        write(tmp_path / "pipe", "by name")
        write(Path(f"/dev/fd/{start}"), "by number")  # as /dev/stdout is one
        assert (os.read(named, 100), os.read(end, 100)) == (b"by name", b"by number")
    finally:
        for number in (named, end, start):
            os.close(number)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_new_file_has_the_rights_of_the_umask_and_an_old_one_keeps_its_own(tmp_path):
    (tmp_path / "old").touch(0o600)
    before = os.umask(0o027)
    try:
        for name in ("old", "new"):
            write(tmp_path / name, "")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("old", "new")] == [0o600, 0o640]


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    """Asked of the file itself, since root may write them all."""
    (tmp_path / "file").write_text("old")
    opened = Path.open

    def refuse(path, *arguments, **named):
        return fails(errno.EACCES)() if path.name == "file" else opened(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match="Permission denied"):
            write(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "old"}


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    write(tmp_path / ("n" * 255), "new")
    assert contents(tmp_path) == {"n" * 255: "new"}


@pytest.mark.parametrize(
    ("name", "said"), [("a\0b", "null byte"), ("a\ud800", "surrogates"), ("n" * 256, "too long"), (".", "directory")]
)
def test_names_that_no_file_can_have_are_refused(name, said, tmp_path):
    with pytest.raises(DataError, match=said):
        write(tmp_path / name, "")
    assert list(tmp_path.iterdir()) == []


# --- stdout ---------------------------------------------------------------------------------------


def test_text_reaches_stdout_at_once(monkeypatch):
    calls = []

    class Spy:
        write = staticmethod(calls.append)

        def flush(self):
            calls.append("flush")

    monkeypatch.setattr(sys, "stdout", Spy())
    to_stdout("a")
    to_stdout("b")
    assert calls == ["a", "flush", "b", "flush"]


def test_a_reader_that_has_left_is_the_command_line_s_to_handle(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", fails(errno.EPIPE), raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(BrokenPipeError):
        to_stdout("a")


@pytest.mark.parametrize("command", ["schema", "init -o -", "doctor"])
@pytest.mark.parametrize(
    ("stdout", "said"),
    [("/dev/full", "standard output: No space left on device"), ("&-", "standard output is closed")],
)
def test_a_stdout_that_takes_nothing_is_one_line(command, stdout, said):
    shell = ["sh", "-c", f'"$0" -m ibft.cli {command} >{stdout}', sys.executable]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, f"error: {said}\n")
