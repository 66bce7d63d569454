"""The folder of a merged model: whole or not there, and nothing of anybody else's is touched."""

import os
import signal

import pytest
from fake_runs import assert_refused, cli, save_run

from ibft.errors import ConfigError
from ibft.merge_target import MARKER, filling, fresh_folder_of


def fill(out, fault=None):
    target, fresh = fresh_folder_of(out)
    with filling(target, fresh, room=10):
        (fresh / "sub").mkdir()
        for name in ("merged.json", "a", "sub/b", "z"):
            (fresh / name).write_text(name)
        if fault:
            fault(fresh)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WHOLE = ["a", "merged.json", "sub", "sub/b", "z"]


def test_a_new_folder_takes_its_name_at_the_end(tmp_path):
    seen = []
    fill(tmp_path / "deep/out", lambda fresh: seen.append((fresh.name, (tmp_path / "deep/out").exists())))
    assert seen == [(".out.new", False)]
    assert tree(tmp_path / "deep/out") == WHOLE
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_empty_folder_stays_the_same_folder_and_merged_json_comes_last(tmp_path, monkeypatch):
    """A mount point cannot be replaced, and whoever stands in a folder that is replaced stands nowhere."""
    out = tmp_path / "out"
    out.mkdir()
    before, moved, replace = out.stat().st_ino, [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(new.name), replace(old, new)))
    tmp_path.chmod(0o500)  # nothing is made beside it, as nothing can be beside a mount point
    monkeypatch.chdir(out)
    fill(type(out)("."), lambda fresh: moved.append(str(fresh.relative_to(out))))
    tmp_path.chmod(0o700)
    assert (out.stat().st_ino, tree(out)) == (before, WHOLE)
    assert moved[0] == ".new"
    assert sorted(moved[1:]) == ["a", "merged.json", "sub", "z"]
    assert moved[-1] == "merged.json"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_merge_has_left_is_removed_and_nothing_else_is(tmp_path, exists):
    out = tmp_path / "out"
    fresh = out / ".new" if exists else tmp_path / ".out.new"
    fresh.mkdir(parents=True)
    (fresh / "mine").write_text("dear to me")
    with pytest.raises(ConfigError, match="is in the way, and no merge has left it"):
        fill(out)
    assert (fresh / "mine").read_text() == "dear to me"
    (fresh / MARKER).touch()
    fill(out)
    assert tree(out) == WHOLE
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_of_that_name_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / ".out.new").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is in the way"):
        fill(tmp_path / "out")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_nothing(tmp_path, exists, number, raised, request):
    if number == signal.SIGINT:  # a shell's background job, as CI's may be, is born ignoring it
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    handler = signal.getsignal(number)
    with pytest.raises(raised) as caught:
        fill(out, lambda fresh: signal.raise_signal(number))
    assert number != signal.SIGTERM or caught.value.code == 143
    assert tree(tmp_path) == (["out"] if exists else [])
    assert signal.getsignal(number) is handler


def test_the_command_ends_by_sigterm_as_a_run_does(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run")
    monkeypatch.setattr("ibft.merge.write_weights", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert cli("merge", run, "-o", tmp_path / "merged").exit_code == 143
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
    (tmp_path / ".merged.new").mkdir()
    (tmp_path / ".merged.new/mine").touch()
    assert_refused(cli("merge", run, "-o", tmp_path / "merged"), 2, ".merged.new is in the way")
