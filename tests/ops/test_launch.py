"""Launch shapes: complete and legal data, the fallback between architectures, and the search that may replace them."""

import json

import pytest
import torch

from ibft_kernels import _launch, philox_normal, tune
from ibft_kernels._aot_cases import CASES
from ibft_kernels.ops import _philox_triton

FILES = ["interpreter", *(f"sm_{a}" for a in _launch.ARCHITECTURES)]
CPU = torch.device("cpu")


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


# --- the data -------------------------------------------------------------------------------------


def test_no_file_is_missing_or_stray():
    assert {path.stem for path in _launch.LAUNCH_FOLDER.glob("*.json")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_kernel_has_an_entry(name):
    for case in CASES.values():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            key = _launch.shape_key(case.launch, name, dtype)
            assert key in _launch.shapes_of(name), (case.launch, dtype)


@pytest.mark.parametrize("name", FILES)
def test_every_entry_is_compiled_ahead_of_time(name):
    shapes = {key.partition("/")[0] for key, shape in _launch.shapes_of(name).items() if "route" not in shape}
    assert shapes == {case.launch for case in CASES.values()}


@pytest.mark.parametrize("name", FILES)
def test_entries_are_legal(name):
    """Blocks, warps and stages, where they were measured, and nothing else: a length or a typing error would show."""
    for key, shape in _launch.shapes_of(name).items():
        assert "measured" in shape, key
        assert shape["measured"] is None or isinstance(shape["measured"], str), key
        if "route" in shape:  # which implementation, not how to launch one
            assert set(shape) <= {"route", "widest", "measured"}, key
            assert shape["route"] in ("fused", "product"), key
            assert is_power_of_two(shape.get("widest", 1)), key
            continue
        assert {"num_warps", "num_stages"} < set(shape) - {"measured"}, key
        for argument, value in shape.items():
            if argument in ("num_warps", "num_stages", "measured"):
                continue
            assert argument == "TILE" or argument.startswith("BLOCK"), (key, argument)
            assert is_power_of_two(value), (key, argument)
        assert is_power_of_two(shape["num_warps"]), key
        assert shape["num_warps"] <= 32, key
        assert 1 <= shape["num_stages"] <= 8, key


def test_every_file_has_the_same_kernels():
    kernels = [{key.partition("/")[0] for key in _launch.shapes_of(name)} for name in FILES]
    assert all(names == kernels[0] for names in kernels)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), "sm_75"), ((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"),
        ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"),
        ((12, 0), "sm_120"), ((12, 1), "sm_120"), ((13, 0), "sm_120"),
    ],
)  # fmt: skip
def test_an_unknown_capability_takes_the_nearest_older(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert _launch.architecture_of(torch.device("cuda")) == expected


def test_the_entry_with_bits_wins(monkeypatch):
    files = {"k": {"TILE": 1, "measured": None}, "k/16": {"TILE": 2, "measured": "here"}}
    monkeypatch.setattr(_launch, "shapes_of", lambda _: files)
    assert _launch.launch_shape("k", CPU, torch.bfloat16) == {"TILE": 2}
    assert _launch.launch_shape("k", CPU, torch.float32) == {"TILE": 1}


def test_a_caller_may_change_its_shape():
    for _ in range(2):
        assert _launch.launch_shape("philox", CPU, torch.float32).pop("TILE")


@pytest.mark.parametrize(
    ("tile", "columns", "expected"),
    [(1024, 1, (64, 16)), (1024, 17, (32, 32)), (1024, 256, (4, 256)), (1024, 4000, (4, 256)), (16, 300, (1, 256))],
)
def test_tile_blocks(tile, columns, expected):
    assert _launch.tile_blocks(tile, columns) == expected


# --- the search -----------------------------------------------------------------------------------


@pytest.fixture
def no_choice(monkeypatch):
    """No earlier search; none of this test's survives it."""
    monkeypatch.setattr(_launch, "chosen", {})
    monkeypatch.setattr(tune, "chosen", _launch.chosen)


@pytest.fixture
def as_sm_90(monkeypatch, no_choice):
    """Interpreted kernels under a GPU's entries, and a clock that prefers TILE 2048 with 8 warps."""
    for module in (_launch, tune):
        monkeypatch.setattr(module, "architecture_of", lambda _: "sm_90")
    monkeypatch.setattr(tune, "ROWS", 8)
    timed = []

    def clock(run):
        run()
        shape = _launch.chosen["sm_90", "philox"]
        timed.append(shape)
        return 1.0 + (shape["TILE"] != 2048) + (shape["num_warps"] != 8)

    monkeypatch.setattr(tune, "_time_ms", clock)
    return timed


def launched_blocks(monkeypatch) -> list[tuple[int, int]]:
    """(BLOCK_N, num_warps) of every launch of the noise kernel from now on."""
    kernel, seen = _philox_triton.philox_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append((options["BLOCK_N"], options["num_warps"]))
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(_philox_triton, "philox_kernel", Spy())
    return seen


def test_autotune_searches_once_and_its_choice_is_launched(monkeypatch, as_sm_90):
    ids = torch.zeros(8, 3, dtype=torch.int32)
    expected = philox_normal(1, ids, 256, backend="triton")
    assert not as_sm_90, "no search without IBFT_AUTOTUNE"

    monkeypatch.setenv("IBFT_AUTOTUNE", "1")
    seen = launched_blocks(monkeypatch)
    assert torch.equal(philox_normal(1, ids, 256, backend="triton"), expected)
    assert len(as_sm_90) == len(tune.KERNELS["philox"][1]), "each candidate once; the file's shape is one of them"
    assert seen[-1] == (2048 // 256, 8)
    assert _launch.chosen == {("sm_90", "philox"): {"TILE": 2048, "num_warps": 8, "num_stages": 1}}

    philox_normal(1, ids, 256, backend="triton")
    assert len(as_sm_90) == len(tune.KERNELS["philox"][1]), "searched twice"


def test_the_interpreter_is_never_searched(monkeypatch, no_choice):
    monkeypatch.setenv("IBFT_AUTOTUNE", "1")
    monkeypatch.setattr(tune, "_time_ms", lambda run: pytest.fail("searched"))
    philox_normal(1, torch.zeros(8, 3, dtype=torch.int32), 16, backend="triton")
    assert not _launch.chosen


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


def test_a_candidate_that_cannot_run_is_a_row(monkeypatch, as_sm_90):
    def clock(run):
        if _launch.chosen["sm_90", "philox"]["TILE"] > 512:
            raise out_of_resources()
        return 1.0

    monkeypatch.setattr(tune, "_time_ms", clock)
    found = list(tune.measure("philox", CPU))
    assert {bool(m.error) for m in found if m.shape["TILE"] > 512} == {True}
    assert all("shared memory" in m.error for m in found if m.error)
    assert tune.search("philox", CPU)["TILE"] == 512


def test_nothing_runs_is_an_error_and_keeps_no_choice(monkeypatch, as_sm_90):
    def clock(run):
        raise out_of_resources()

    monkeypatch.setattr(tune, "_time_ms", clock)
    with pytest.raises(RuntimeError, match="philox: no launch shape runs on this device"):
        tune.search("philox", CPU)
    assert not _launch.chosen


def test_another_failure_is_not_hidden(monkeypatch, as_sm_90):
    monkeypatch.setattr(tune, "_time_ms", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.search("philox", CPU)
    assert not _launch.chosen


def test_a_failed_compiler_pass_is_a_refusal_and_a_device_fault_is_not():
    assert tune._is_refusal(RuntimeError("PassManager::run failed"))
    assert not tune._is_refusal(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("key", tune.KERNELS)
def test_what_is_timed_runs_and_takes_the_candidate(monkeypatch, no_choice, key):
    """Its first and its last; the launcher must ask for this very entry."""
    for name, size in {"ROWS": 8, "CHUNK": 4, "HIDDEN": 256, "VOCABULARY": 300}.items():
        monkeypatch.setattr(tune, name, size)
    asked = []
    inner = _launch.shape_key
    monkeypatch.setattr(_launch, "shape_key", lambda *place: asked.append(inner(*place)) or asked[-1])
    make, candidates = tune.KERNELS[key]
    work = make(torch.float32 if key.endswith("/32") else torch.float16, CPU)
    assert work.bytes + work.flops > 0
    for shape in (candidates[0], candidates[-1]):
        _launch.chosen["interpreter", key] = _launch.stored_shape("interpreter", key) | shape
        work.run()
    assert key in asked


@pytest.mark.parametrize("name", FILES)
def test_every_entry_can_be_searched(name):
    assert set(_launch.shapes_of(name)) == set(tune.KERNELS)
    for key, (_, candidates) in tune.KERNELS.items():
        stored = set(_launch.stored_shape(name, key))
        assert {frozenset(stored - set(shape)) for shape in candidates} <= {frozenset(), frozenset({"BLOCK_Z"})}, key
        assert all(set(shape) <= stored for shape in candidates), key


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kernel", ["ib_bottleneck_backward", "ib_lora_backward_fused"])
def test_the_latent_that_is_timed_fits_on_chip(monkeypatch, no_choice, name, kernel):
    """And no candidate claims another width, which the op would then take the fused route for."""
    monkeypatch.setattr(tune, "architecture_of", lambda _: name)
    monkeypatch.setattr(tune, "ROWS", 2)
    monkeypatch.setattr(tune, "HIDDEN", 16)
    monkeypatch.setattr(tune, "_time_ms", lambda run: 1.0)
    for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
        widest = _launch.shapes_of(name)[f"{kernel}/{bits}"]["BLOCK_Z"]
        _, _, weight, _ = tune._encoder(dtype, CPU, kernel)
        assert weight.shape[0] // 2 == min(tune.LATENT, widest)
        assert {m.shape["BLOCK_Z"] for m in tune.measure(f"{kernel}/{bits}", CPU)} == {widest}


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_written_file_round_trips(tmp_path, name):
    """To the byte, so that a search changes only its own lines."""
    path = tmp_path / "shapes.json"
    tune.write_shapes(path, _launch.shapes_of(name))
    assert path.read_text() == (_launch.LAUNCH_FOLDER / f"{name}.json").read_text()


def test_the_command_stores_the_fastest(monkeypatch, tmp_path, capsys, as_sm_90):
    original = (_launch.LAUNCH_FOLDER / "sm_90.json").read_text()
    (tmp_path / "sm_90.json").write_text(original)
    for module in (_launch, tune):
        monkeypatch.setattr(module, "LAUNCH_FOLDER", tmp_path)
    _launch.shapes_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    philox = tune.KERNELS["philox"]
    monkeypatch.setitem(tune.KERNELS, "philox", (lambda dtype, _: philox[0](dtype, CPU), philox[1]))
    try:
        assert tune.main(["--kernel", "philox"]) == 0
        assert (tmp_path / "sm_90.json").read_text() == original, "written without --write"
        assert tune.main(["--kernel", "philox", "--write"]) == 0
        written = json.loads((tmp_path / "sm_90.json").read_text())
        assert _launch.launch_shape("philox", CPU, torch.float32)["TILE"] == 2048
    finally:
        _launch.shapes_of.cache_clear()
    assert written["philox"].pop("measured").startswith(f"Some GPU, torch {torch.__version__}, triton ")
    assert written.pop("philox") == {"TILE": 2048, "num_warps": 8, "num_stages": 1}
    assert written == {key: shape for key, shape in json.loads(original).items() if key != "philox"}
    assert "fastest" in capsys.readouterr().out


def test_the_command_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--write"]) == 2
    assert capsys.readouterr().err == "ibft_kernels.tune: cannot measure: no CUDA device\n"


def test_an_unknown_kernel_is_named(monkeypatch, capsys, as_sm_90):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        tune.main(["--kernel", "phlox"])
    assert stop.value.code == 2
    assert "got ['phlox']" in capsys.readouterr().err
