"""No fault leaves less than was there before: each file damaged, each write failing, killed before each call."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from ibft import checkpoint
from ibft.checkpoint import keep, latest, load, os_errors, save, verify
from ibft.errors import ConfigError, SetupError

FILES = [
    "adapter_config.json", "adapter_model.safetensors", "extra/template.jinja", "optimizer.safetensors", "state.json",
    "tokenizer.json",
]  # fmt: skip
TENSORS = {"weights/lora/0": torch.arange(2000.0), "lora/0/step": torch.tensor(3.0), "state": torch.ones(9).byte()}
# each file takes more than a page, so that a disk can be full in the middle of each
FACTS = {"step": 3, "rate": 0.1 + 0.2, "notes": "n" * 5000}


def fill(folder):
    """What a run writes, with the libraries that write it."""
    save_file({"lora_A": torch.ones(40, 40)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "notes": "n" * 5000}))
    words = {f"word {number}": number for number in range(300)}
    Tokenizer(models.WordLevel(words, unk_token="word 0")).save(str(folder / "tokenizer.json"))
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("t" * 5000)


def make(root, *steps, **more):
    return [save(root, step, fill, TENSORS, FACTS | more) for step in steps]


def names(root):
    return sorted(path.name for path in root.iterdir())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- saving, loading, keeping


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    (folder,) = make(root, 3)
    assert folder == root / "step-3"
    assert sorted(contents(folder)) == sorted([*FILES, "manifest.json"])
    assert verify(folder) is None
    assert latest(root) == (folder, [])
    tensors, facts = load(folder)
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 3)
    assert sorted(manifest["files"]) == FILES
    assert manifest["files"]["extra/template.jinja"] == {
        "size": 5000,
        "sha256": "b55c73dd017f6fafb5939b7073e73660000de3cb445eff2e54ed2d65db1c18de",  # printf 't%.0s' {1..5000}
    }


def test_all_is_on_disk_and_read_back_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """Files, then their manifest, then the folder; verified; renamed; then the folder above."""
    make(tmp_path, 3)
    events = []
    fsync, replace, check = os.fsync, os.replace, checkpoint.verify
    monkeypatch.setattr(os, "fsync", lambda number: events.append(path_of(number)) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace(*paths))
    monkeypatch.setattr(checkpoint, "verify", lambda path: events.append("verify") or check(path))

    def path_of(number):
        return os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path)

    make(tmp_path, 4)
    fresh = ".step-4.new"
    whole = [f"{fresh}/{name}" for name in FILES]
    assert sorted(events[:7]) == sorted([*whole, f"{fresh}/extra"])
    assert events[7:] == [f"{fresh}/manifest.json", fresh, "verify", "rename", "."]


def test_what_is_not_read_back_as_it_was_written_is_no_checkpoint(tmp_path, monkeypatch):
    """A disk that takes every byte and keeps others."""
    (old,) = make(tmp_path, 3)
    before = contents(old)
    rewritten = checkpoint._sync_and_hash

    def corrupting(path):
        digest = rewritten(path)
        if path.name == "optimizer.safetensors":
            flip(path, 4000 * 8)
        return digest

    monkeypatch.setattr(checkpoint, "_sync_and_hash", corrupting)
    with pytest.raises(OSError, match=r"does not hold what was written to it: optimizer.safetensors") as caught:
        make(tmp_path, 3)
    assert caught.value.errno == errno.EIO
    assert names(tmp_path) == ["step-3"]
    assert contents(old) == before


def test_a_checkpoint_is_replaced_by_one_of_its_name(tmp_path):
    make(tmp_path, 3)
    (folder,) = make(tmp_path, 3, rate=0.7)
    assert names(tmp_path) == ["step-3"]
    assert load(folder)[1]["rate"] == 0.7


def test_whatever_stops_a_save_leaves_nothing_of_it(tmp_path):
    make(tmp_path, 3)
    for error in (RuntimeError("a bug"), KeyboardInterrupt()):

        def failing(folder, error=error):
            fill(folder)
            raise error

        with pytest.raises(type(error)):
            save(tmp_path, 4, failing, TENSORS, FACTS)
        assert names(tmp_path) == ["step-3"]


def test_the_newest_by_number_are_kept(tmp_path):
    make(tmp_path, 99, 100, 9)
    assert latest(tmp_path) == (tmp_path / "step-100", [])
    keep(tmp_path, last=2)
    assert names(tmp_path) == ["step-100", "step-99"]
    keep(tmp_path, last=1)
    assert names(tmp_path) == ["step-100"]
    with pytest.raises(ValueError, match="last: got 0"):
        keep(tmp_path, last=0)


def test_a_whole_one_is_never_given_up_for_a_damaged_newer_one(tmp_path):
    make(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    keep(tmp_path, last=1)
    assert names(tmp_path) == ["step-2"]
    (tmp_path / "step-2" / "state.json").unlink()
    keep(tmp_path, last=1)
    assert names(tmp_path) == ["step-2"]  # all damaged: nothing is removed


def test_what_is_no_checkpoint_of_ours_is_left_alone(tmp_path):
    make(tmp_path, 1, 2)
    (tmp_path / "step-7").write_text("a file")
    for name in ("step-007", "step-8-copy", "notes", ".step-x.new"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-9").symlink_to(tmp_path / "step-1")
    keep(tmp_path, last=1)
    make(tmp_path, 3)
    keep(tmp_path, last=1)
    assert names(tmp_path) == [".step-x.new", "notes", "step-007", "step-3", "step-7", "step-8-copy", "step-9"]
    assert latest(tmp_path) == (tmp_path / "step-3", [])


def test_without_a_folder_there_is_no_checkpoint(tmp_path):
    assert latest(tmp_path / "none") == (None, [])
    keep(tmp_path / "none", last=1)
    assert verify(tmp_path / "none") == "manifest.json: missing"
    (tmp_path / "file").write_text("")
    assert latest(tmp_path / "file") == (None, [])
    assert verify(tmp_path / "file") is not None


def test_a_folder_that_cannot_be_read_is_said_in_one_line(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SetupError, match=rf"^{re.escape(str(tmp_path))}: Permission denied$"):
        latest(tmp_path)


# --- damage


def flip(path, bit):
    whole = bytearray(path.read_bytes())
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)


def garbage(path):
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


DAMAGES: dict[str, Callable] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "short of a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one bit": lambda path: flip(path, path.stat().st_size * 8 // 2 + 3),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": garbage,
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    make(tmp_path, 9, 10)
    DAMAGES[damage](tmp_path / "step-10" / name)
    found, warnings = latest(tmp_path)
    assert found == tmp_path / "step-9"
    (line,) = warnings
    assert line.startswith(f"{tmp_path}/step-10 is damaged and left out: ")
    assert name in line or (name, damage) == ("manifest.json", "one bit")  # which may be in another's size
    assert "\n" not in line
    with pytest.raises(ConfigError, match=r"step-10 is no whole checkpoint: "):
        load(tmp_path / "step-10")


def test_the_reasons_say_what_was_found(tmp_path):
    (folder,) = make(tmp_path, 10)
    os.truncate(folder / "state.json", 1000)
    size = len(json.dumps(FACTS, indent=1)) + 1
    assert verify(folder) == f"state.json: 1,000 bytes, expected {size:,}"
    make(tmp_path, 10)
    flip(folder / "state.json", 99)
    assert verify(folder) == "state.json: not the bytes that were written (its sha256 differs)"
    os.truncate(folder / "manifest.json", 0)
    assert verify(folder) == "manifest.json: empty"


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path, soaking):
    (folder,) = make(tmp_path, 10)
    path, rng = folder / "manifest.json", random.Random(2)
    whole = path.read_bytes()
    bits = range(8 * len(whole))
    for bit in bits if soaking else rng.sample(bits, 300):
        flip(path, bit)
        assert verify(folder) is not None, path.read_bytes()
        path.write_bytes(whole)
    assert verify(folder) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=2), "manifest.json: format '2', this version reads 1"),
        (lambda m: m.update(step=9), "manifest.json: of step '9', expected 10"),
        (lambda m: m.update(files=[]), "manifest.json: no list of files in it"),
        (lambda m: m.update(files={}), "manifest.json does not list adapter_model.safetensors"),
        (lambda m: m["files"].pop("state.json"), "manifest.json does not list state.json"),
        (lambda m: m["files"].update({"state.json": 3}), "manifest.json: no size of state.json"),
        (lambda m: m["files"].update({"../step-9/state.json": {}}), "'../step-9/state.json' is no name of a file"),
        (lambda m: m["files"].update({"/etc/passwd": {}}), "'/etc/passwd' is no name of a file"),
        (lambda m: m["files"].update({"a\nb": {}}), "'a\\nb' is no name of a file"),
        (lambda m: m["files"].update({"a\0b": {}}), "'a\\x00b' is no name of a file"),
        (lambda m: m["files"].update({"": {}}), "no file"),
        (lambda m: m["files"].update({"n" * 300: {}}), "File name too long"),
        (lambda m: m["files"].update({"gone/away.json": {}}), "gone/away.json: missing"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(tmp_path, change, reason):
    (folder,) = make(tmp_path, 10)
    rewrite_manifest(folder, change)
    found = verify(folder)
    assert found is not None
    assert reason in found
    assert "\n" not in found


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", '{"format": 1}', "\ud800", "9" * 10_000])
def test_a_manifest_of_any_other_kind_is_refused(tmp_path, text):
    (folder,) = make(tmp_path, 10)
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    found = verify(folder)
    assert found is not None
    assert found.startswith("manifest.json: no ")


@pytest.mark.parametrize("name", ["state.json", "extra/template.jinja", "manifest.json"])
def test_links_out_of_the_folder_are_refused_and_links_within_are_files(tmp_path, name):
    (folder,) = make(tmp_path / "checkpoints", 10)
    outside = tmp_path / "outside"
    shutil.copy(folder / name, outside)
    (folder / name).rename(folder / "moved")
    (folder / name).symlink_to(outside)
    assert verify(folder) == f"{name}: a link that leads out of the folder"
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "moved")
    assert verify(folder) is None  # and the extra file is tolerated
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    assert verify(folder) is not None  # round in a circle


def test_a_folder_that_is_a_link_out_is_refused(tmp_path):
    (folder,) = make(tmp_path / "checkpoints", 10)
    (folder / "extra").rename(tmp_path / "extra")
    (folder / "extra").symlink_to(tmp_path / "extra")
    assert verify(folder) == "extra/template.jinja: a link that leads out of the folder"


@pytest.mark.parametrize("tensors", [{}, {"lora_A": torch.ones(0, 4)}])
def test_an_adapter_without_parameters_is_refused(tmp_path, tensors):
    def empty(folder):
        fill(folder)
        save_file(tensors, folder / "adapter_model.safetensors")

    with pytest.raises(OSError, match="zero trainable parameters"):
        save(tmp_path, 10, empty, TENSORS, FACTS)
    (folder,) = make(tmp_path, 10)
    save_file(tensors, folder / "adapter_model.safetensors")
    digest = checkpoint._sync_and_hash(folder / "adapter_model.safetensors")
    size = (folder / "adapter_model.safetensors").stat().st_size
    rewrite_manifest(
        folder, lambda m: m["files"].update({"adapter_model.safetensors": {"size": size, "sha256": digest}})
    )
    assert verify(folder) == "adapter_model.safetensors: no tensor in it: zero trainable parameters"


@pytest.mark.parametrize(("name", "text"), [("state.json", "[]"), ("state.json", "{"), ("optimizer.safetensors", "x")])
def test_a_whole_folder_of_another_program_is_refused(tmp_path, name, text):
    (folder,) = make(tmp_path, 10)
    (folder / name).write_text(text)
    digest = checkpoint._sync_and_hash(folder / name)
    rewrite_manifest(folder, lambda m: m["files"].update({name: {"size": len(text), "sha256": digest}}))
    with pytest.raises(ConfigError, match=r"step-10.*: (cannot be read|expected an object)") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_copy_may_have_another_name(tmp_path):
    (folder,) = make(tmp_path, 10)
    folder.rename(tmp_path / "best so far")
    assert verify(tmp_path / "best so far") is None
    shutil.copytree(tmp_path / "best so far", tmp_path / "step-11")
    assert verify(tmp_path / "step-11") == "manifest.json: of step '10', expected 11"


# --- a full disk


def in_child(job):
    """The exit status of a forked process that runs it: what it returns, 99 for an exception, minus a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = job() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_call(number, act, *, writes_only):
    """Calls `act` before the call number `number` (from 1) to the file system; for good, so in a child only."""
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    def hook(event, args):
        opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        removes = event in ("os.remove", "os.rmdir") and not writes_only
        if opens or removes or event in ("os.mkdir", "os.rename"):
            count()

    fsync = os.fsync
    os.fsync = lambda file: count() or fsync(file)
    sys.addaudithook(hook)


FAILED, SAVED = 3, 4


def try_to_save(root, step):
    """FAILED for a full disk."""
    try:
        make(root, step, rate=0.7)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG):
            raise
        return FAILED
    return SAVED


@pytest.mark.parametrize("step", [3, 4])
def test_a_full_disk_at_any_call_costs_nothing_that_was_there(tmp_path, step):
    """Saving step 4 beside step 3, or step 3 again."""
    make(tmp_path / "template", 3)
    before = contents(tmp_path / "template" / "step-3")

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def job(root, number):
        at_call(number, full, writes_only=True)
        return try_to_save(root, step)

    failed = 0
    while True:
        root = tmp_path / f"try-{failed}"
        shutil.copytree(tmp_path / "template", root)
        status = in_child(lambda root=root, number=failed + 1: job(root, number))
        if status == SAVED:
            break
        assert status == FAILED, failed
        failed += 1
        found, warnings = latest(root)
        assert found is not None
        assert warnings == []
        if load(found)[1]["rate"] != 0.7:  # else it had its name, and only the folder above was not synced
            assert names(root) == ["step-3"]
            assert contents(root / "step-3") == before
    # two folders, four files that Python opens, ten syncs, and the renames
    assert failed == 16 + {3: 2, 4: 1}[step]


def test_a_file_that_may_not_grow_is_an_os_error_whoever_writes_it(tmp_path):
    """RLIMIT_FSIZE below the size of each file in turn: safetensors, tokenizers and Python meet it."""
    (folder,) = make(tmp_path, 3)
    before = contents(folder)

    def job(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return try_to_save(tmp_path, 4)

    for size in sorted(len(content) for content in before.values()):
        assert in_child(lambda limit=size - 1: job(limit)) == FAILED
        assert names(tmp_path) == ["step-3"]
        assert contents(folder) == before
    assert in_child(lambda: job(10**6)) == SAVED


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_costs_nothing_that_was_there(small_disk):
    """With no page left, one, two, ... until a save fits."""
    root = small_disk / "checkpoints"
    (old,) = make(root, 3)
    before = contents(old)
    free = os.statvfs(small_disk).f_bavail
    page = os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    for pages in range(free):
        ballast.write_bytes(bytes((free - pages) * page))
        if try_to_save(root, 4) == SAVED:
            break
        assert names(root) == ["step-3"]
        assert contents(old) == before
        ballast.unlink()
    assert 13 <= pages < free  # of six files of two pages or more, and the manifest
    assert latest(root) == (root / "step-4", [])


def test_an_error_that_is_none_of_the_system_goes_on_as_it_is():
    with pytest.raises(KeyError), os_errors():
        raise KeyError("a bug")
    with pytest.raises(OSError) as caught, os_errors():
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, "No space left on device")


# --- killed


def whole_alone(root):
    """As a save leaves it."""
    make(root, 3)


def whole_under_a_hidden_name(root):
    """As a kill between two renames leaves it, with what other kills have left."""
    make(root, 3)
    (root / "step-3").rename(root / ".step-3.new")
    shutil.copytree(root / ".step-3.new", root / ".step-3.old")
    shutil.copytree(root / ".step-3.new", root / ".step-4.new")
    (root / ".step-4.new" / "manifest.json").unlink()


def damaged_beside_a_hidden_whole_one(root):
    whole_under_a_hidden_name(root)
    shutil.copytree(root / ".step-3.new", root / "step-3")
    (root / "step-3" / "state.json").unlink()


@pytest.mark.parametrize(
    ("start", "step"),
    [(whole_alone, 3), (whole_alone, 4), (whole_under_a_hidden_name, 3), (damaged_beside_a_hidden_whole_one, 4)],
)
def test_killed_before_any_call_there_is_a_whole_checkpoint(tmp_path, start, step):
    """SIGKILL before each call that changes a folder, in saving and in removing what is older."""
    start(tmp_path / "template")

    def job(root, number):
        at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL), writes_only=False)
        make(root, step, rate=0.7)
        keep(root, last=1)

    killed = 0
    while True:
        root = tmp_path / f"try-{killed}"
        shutil.copytree(tmp_path / "template", root)
        status = in_child(lambda root=root, number=killed + 1: job(root, number))
        found, _ = latest(root)
        assert found is not None, killed
        if start is not damaged_beside_a_hidden_whole_one:
            assert all(verify(folder) is None for folder in root.glob("step-*"))  # none is seen half made or removed
        _, facts = load(found)
        assert facts == FACTS | {"rate": facts["rate"]}
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        make(root, 5)
        keep(root, last=2)
        assert [name for name in names(root) if name.startswith(".")] == []
        assert latest(root) == (root / "step-5", [])
        assert len(names(root)) == 2  # whatever was there counts, or was made whole again
    assert killed >= 20
    assert names(root) == [f"step-{step}"]
    assert facts["rate"] == 0.7


def test_killed_at_random_instants_the_newest_is_whole_or_the_one_before_it(tmp_path):
    rng = random.Random(6)
    last = 0
    for _ in range(6):
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(last + 1, last + 1000):
                    for _ in range(2):  # the second replaces the first
                        make(tmp_path, step)
                        keep(tmp_path, last=2)
                        os.write(tell, step.to_bytes(2, "big"))
            finally:
                os._exit(1)
        os.close(tell)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with os.fdopen(told, "rb") as pipe:
            saved = int.from_bytes(pipe.read()[-2:], "big") or last
        found, warnings = latest(tmp_path)
        assert warnings == []
        if found is None:
            assert saved == 0
            continue
        assert load(found)[1] == FACTS
        last = int(re.search(r"step-(\d+)", found.name)[1])
        assert last in (saved, saved + 1)
    assert last > 0
    make(tmp_path, last + 1)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
