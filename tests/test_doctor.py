"""`ibft-fast doctor`: each check where its tool is there, absent, too old or failing; nothing raises, nothing asks the
network."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from collections import namedtuple
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import ibft.doctor
from ibft.cli import app
from ibft.doctor import CHECKS, examine, gpu, machine, packages, run_doctor, tools
from ibft.doctor.finding import Finding, first_line
from ibft.errors import SetupError

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def card(monkeypatch):
    """A machine with one GPU, as far as torch says."""

    def present(capability=(8, 0), count=1, free=70 * GIB):
        answers = {
            "is_available": True,
            "device_count": count,
            "get_device_capability": capability,
            "get_device_name": "NVIDIA A100",
            "mem_get_info": (free, 80 * GIB),
            "memory_reserved": 0,
            "memory_allocated": 0,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.version, "cuda", "12.8")

    return present


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def raises(error):
    def call(*_, **__):
        raise error

    return call


# --- the command ----------------------------------------------------------------------------------


def test_a_whole_machine_ends_with_0_and_says_so(capsys):
    checks = {"torch": lambda: Finding("ok", "2.13"), "hub": lambda: Finding("note", "offline", "no matter")}
    assert run_doctor(checks) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       torch               2.13",
        "note     hub                 offline -> no matter",
        "ibft-fast train can run here",
    ]


def test_what_training_needs_ends_with_4_when_it_is_missing_and_a_warning_does_not(capsys):
    checks = {"torch": lambda: Finding("missing", "gone", "pip install torch"), "disk": lambda: Finding("warning", "")}
    assert run_doctor(checks) == 4
    assert capsys.readouterr().out.splitlines()[-1] == "ibft-fast train cannot run here: torch"
    assert run_doctor({"disk": checks["disk"]}) == 0


def test_a_check_that_raises_is_one_line_and_the_next_one_is_made():
    checks = {"first": raises(RuntimeError("out of luck\nat line 3")), "second": lambda: Finding("ok", "fine")}
    assert dict(examine(checks)) == {
        "first": Finding("warning", "could not be checked: RuntimeError: out of luck"),
        "second": Finding("ok", "fine"),
    }


def test_for_machines_there_is_nothing_but_json_on_stdout(monkeypatch):
    def noisy():
        print("a library's banner")
        return Finding("missing", "none", "buy one")

    monkeypatch.setattr(ibft.doctor, "CHECKS", {"GPU": noisy})
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    assert done.exit_code == 4
    assert json.loads(done.stdout) == {
        "can_train": False,
        "checks": [{"check": "GPU", "state": "missing", "found": "none", "advice": "buy one"}],
    }
    assert done.stderr == "a library's banner\n"


# Programs under test are run by tests that look for any left over: none is run beside them.
WITHOUT_SANDBOX = """
from ibft.doctor import CHECKS
from ibft.cli import main
del CHECKS["sandbox"]
main()
"""


def test_this_machine_can_train(tmp_path):
    """The command as a user starts it: the kernel is really compiled, or run on the GPU that there is."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-c", WITHOUT_SANDBOX, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert list(found) == [name for name in CHECKS if name != "sandbox"]
    assert not [row for row in found.values() if "could not be checked" in row["found"]]
    assert found["bitsandbytes"]["state"] == "ok"
    if not torch.cuda.is_available():
        assert found["Triton"]["found"].startswith("no GPU to run on; ib_kl_forward compiles for sm_80, ")
        assert any((tmp_path / "compiled").rglob("*.cubin"))
    assert all("\n" not in row["found"] + row["advice"] for row in found.values())


def test_without_torch_every_check_still_has_its_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    checks = {name: CHECKS[name] for name in ("torch", "CUDA", "GPUs", "GPU memory", "Triton", "memory", "threads")}
    found = dict(examine(checks))
    assert found["torch"].state == "missing"
    assert "ModuleNotFoundError" in found["torch"].found
    assert {finding.state for name, finding in found.items() if name != "torch"} == {"warning"}


# --- versions -------------------------------------------------------------------------------------


def test_python_outside_the_range_is_missing(monkeypatch):
    assert packages.python().state == "ok"
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    finding = packages.python()
    assert finding.state == "missing"
    assert "3.10.14, needs" in finding.found


def asks(monkeypatch, requirements, versions):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(metadata, "version", version)
    return packages.required()


def test_packages_in_their_ranges(monkeypatch):
    asked = [
        "torch>=2.11",
        "peft>=0.19",
        'pywin; sys_platform == "win32"',
        'wandb; extra == "wandb"',
        'ruff; extra == "dev"',
    ]
    found = asks(monkeypatch, asked, {"torch": "2.13.0.dev20260901+cu128", "peft": "0.19"})
    assert found == Finding("ok", "torch 2.13.0.dev20260901+cu128, peft 0.19")


def test_packages_that_are_absent_or_too_old_are_named_with_the_command(monkeypatch):
    asked = ["torch>=2.11", "transformers>=5.10.1,<6", "peft>=0.19"]
    found = asks(monkeypatch, asked, {"transformers": "5.2.0", "torch": "2.12"})
    assert found.state == "missing"
    assert found.found == "transformers 5.2.0, needs <6,>=5.10.1; peft is not installed"
    assert found.advice == "pip install 'transformers<6,>=5.10.1' 'peft>=0.19'"


def test_torch_says_what_it_is_built_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert packages.torch() == Finding("ok", f"{torch.__version__}, built for the CPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert packages.torch().found.endswith("built for CUDA 12.8")


# --- GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(monkeypatch):
    """Answers as told: stdout, exit code, stderr."""

    def answers(stdout="", code=0, stderr=""):
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        done = subprocess.CompletedProcess([], code, stdout, stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    return answers


def test_the_driver_answers(nvidia_smi):
    nvidia_smi("NVIDIA A100, 570.10, 81920 MiB\nNVIDIA A100, 570.10, 81920 MiB\n")
    assert gpu.driver() == Finding("ok", "NVIDIA A100, 570.10, 81920 MiB; NVIDIA A100, 570.10, 81920 MiB")


def test_the_driver_is_absent_fails_or_hangs(nvidia_smi, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert gpu.driver().state == "note"
    nvidia_smi(code=18, stderr="Failed to initialize NVML: Driver/library version mismatch\nNVML library 570\n")
    failed = gpu.driver()
    assert failed.state == "warning"
    assert failed.found == "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"
    nvidia_smi(code=9)
    assert gpu.driver().found == "nvidia-smi fails: exit code 9"
    monkeypatch.setattr(subprocess, "run", raises(subprocess.TimeoutExpired("nvidia-smi", 20)))
    assert gpu.driver().found == "nvidia-smi does not answer within 20 s"


def test_a_gpu_has_its_capability_and_precision(card):
    card((9, 0))
    assert gpu.cuda() == Finding("ok", "12.8, NVIDIA A100, compute capability 9.0, bf16")
    card((7, 5))
    assert gpu.cuda() == Finding("ok", "12.8, NVIDIA A100, compute capability 7.5, no bf16, so fp16")
    card((7, 0))
    assert gpu.cuda().state == "warning"
    assert "7.5 and newer" in gpu.cuda().advice


def test_torch_without_cuda_beside_a_gpu_is_a_warning_and_without_one_none(no_card, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(gpu, "driver", lambda: Finding("note", ""))
    assert gpu.cuda() == Finding("note", "no GPU")
    monkeypatch.setattr(gpu, "driver", lambda: Finding("ok", "NVIDIA A100"))
    assert gpu.cuda() == Finding("warning", "there is a GPU, and torch is built for the CPU", gpu.CUDA_BUILD)


def test_a_driver_that_is_too_old_for_torch_is_said_in_its_words(monkeypatch):
    import warnings

    def unavailable():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\n(found 11040)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(gpu, "driver", lambda: Finding("ok", "NVIDIA A100"))
    finding = gpu.cuda()
    assert finding.state == "warning"
    assert finding.found == (
        "torch for CUDA 12.8 finds no device: CUDA initialization: The NVIDIA driver on your system is too old"
    )


def test_several_gpus_and_their_memory(card, no_card):
    assert (gpu.several(), gpu.memory()) == (Finding("note", "no GPU"), Finding("note", "no GPU"))
    card()
    assert gpu.several() == Finding("ok", "1")
    assert gpu.memory() == Finding("ok", "70.0 of 80.0 GiB free", "what a run takes: ibft-fast estimate")
    card(count=4, free=39 * GIB)
    assert "torchrun --nproc_per_node 4 -m ibft.cli train" in gpu.several().advice
    assert gpu.memory().state == "warning"


def test_triton_is_needed_on_a_gpu_alone(card, no_card, monkeypatch):
    monkeypatch.setattr("ibft_kernels._triton.HAVE_TRITON", False)
    assert gpu.kernels() == Finding("note", "not installed")
    card()
    assert gpu.kernels() == Finding("missing", "not installed", "pip install triton")


def test_the_interpreter_is_warned_of(no_card, monkeypatch):
    monkeypatch.setattr("ibft_kernels._dispatch.INTERPRETED", True)
    assert gpu.kernels() == Finding(
        "warning", "TRITON_INTERPRET is set: kernels run in the interpreter", "unset TRITON_INTERPRET"
    )


def test_without_a_gpu_a_kernel_is_compiled_for_one(no_card, monkeypatch):
    from ibft_kernels.aot import Row

    asked = []

    def compiled(*arguments, error=""):
        asked.append(arguments)
        return Row(*arguments, registers=64, error=error)

    monkeypatch.setattr("ibft_kernels.aot.compile_one", compiled)
    assert gpu.kernels() == Finding("note", "no GPU to run on; ib_kl_forward compiles for sm_80, 64 registers")
    assert asked == [("ib_kl_forward", "bf16", 80)]
    monkeypatch.setattr("ibft_kernels.aot.compile_one", lambda *a: compiled(*a, error="ptxas is not there"))
    assert gpu.kernels().state == "warning"
    assert "ptxas is not there" in gpu.kernels().found


def test_a_kernel_that_runs_wrong_or_not_at_all_on_the_gpu_is_missing(card, monkeypatch):
    card()
    monkeypatch.setattr(gpu, "kernel_error", lambda device: 2e-6)
    assert gpu.kernels() == Finding("ok", "ib_kl_loss runs on the GPU, within 2.0e-06 of torch")
    for error in (2e-4, float("nan")):
        monkeypatch.setattr(gpu, "kernel_error", lambda device, error=error: error)
        assert gpu.kernels().state == "missing"
    monkeypatch.setattr(gpu, "kernel_error", raises(RuntimeError("Failed to find C compiler. Set CC\nor else")))
    assert gpu.kernels() == Finding(
        "missing", "ib_kl_loss does not run: RuntimeError: Failed to find C compiler. Set CC", gpu.COMPILER
    )
    monkeypatch.setattr(gpu, "kernel_error", raises(RuntimeError("no kernel image is available")))
    assert gpu.kernels().advice == gpu.REINSTALL


def test_the_kernel_is_held_against_torch_in_values_and_gradients(monkeypatch):
    """Here in the interpreter; on a GPU with -m gpu."""
    import ibft_kernels
    from ibft_kernels import _dispatch

    if not (_dispatch.HAVE_TRITON and _dispatch.triton.knobs.runtime.interpret):
        pytest.skip("kernels are not interpreted here")
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    assert gpu.kernel_error(torch.device("cpu")) <= gpu.KERNEL_ERROR
    right = ibft_kernels.ib_kl_loss

    def wrong_gradient(mu, logvar, *, backend, **options):
        z, kl = right(mu, logvar, backend=backend, **options)
        return (z + 0.01 * (mu - mu.detach()) if backend == "triton" else z), kl

    monkeypatch.setattr(ibft_kernels, "ib_kl_loss", wrong_gradient)
    assert gpu.kernel_error(torch.device("cpu")) == pytest.approx(0.01, abs=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_runs_and_a_weight_goes_to_four_bits_and_back():
    assert (gpu.kernels().state, gpu.four_bits().state, gpu.cuda().state) == ("ok", "ok", "ok")


def test_bitsandbytes_is_absent_has_no_gpu_build_fails_or_is_wrong(card, no_card, monkeypatch):
    import bitsandbytes  # noqa: F401

    monkeypatch.setattr(gpu, "nf4_error", lambda device: 0.21)
    assert "off by 2.1e-01" in gpu.four_bits().found
    monkeypatch.setattr(gpu, "nf4_error", raises(RuntimeError("no kernel image")))
    assert gpu.four_bits().state == "missing"
    assert "fails: RuntimeError: no kernel image" in gpu.four_bits().found
    card()
    monkeypatch.setattr("bitsandbytes.cextension.lib", object())
    assert gpu.four_bits().state == "missing"
    assert "no library for CUDA 12.8" in gpu.four_bits().found
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert gpu.four_bits().state == "missing"
    assert gpu.four_bits().advice == "pip install -U bitsandbytes"


def test_a_weight_goes_to_four_bits_and_back_with_their_error():
    assert 0.01 < gpu.nf4_error(torch.device("cpu")) <= gpu.NF4_ERROR  # an error of 0 would be no 4 bits


def test_the_four_bits_are_those_of_training(monkeypatch):
    from bitsandbytes import functional

    quantize, asked = functional.quantize_4bit, []

    def spy(weight, **settings):
        asked.append(settings)
        return quantize(weight, **settings)

    monkeypatch.setattr(functional, "quantize_4bit", spy)
    gpu.nf4_error(torch.device("cpu"))
    assert asked == [{"quant_type": "nf4", "compress_statistics": True}]


# --- machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "state"), [(None, "note"), (GIB, "warning"), (8 * GIB, "ok")])
def test_free_memory(free, state, monkeypatch):
    monkeypatch.setattr("ibft.memory.free_memory", lambda device: free)
    assert machine.memory().state == state


@pytest.mark.parametrize(
    ("count", "cores", "named", "state"),
    [(4, 4, None, "ok"), (8, 4, "8", "warning"), (1, 16, "1", "warning"), (8, 16, None, "ok")],
)
def test_threads_are_as_many_as_cores(count, cores, named, state, no_card, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    finding = machine.threads()
    assert finding.state == state
    assert (f"OMP_NUM_THREADS={cores}" in finding.advice) == (state == "warning")


def test_room_on_a_disk(tmp_path, monkeypatch):
    usage = Usage(100 * GIB, 0, 6 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path == tmp_path else None)
    assert machine.room(tmp_path / "not" / "yet", 5 * GIB, "a run", "elsewhere").state == "ok"
    few = machine.room(tmp_path, 20 * GIB, "a run", "elsewhere")
    assert (few.state, few.found) == ("warning", f"{tmp_path}: 6.0 GiB free")
    assert few.advice == "a run wants 20 GiB; elsewhere"


def test_a_folder_that_nobody_can_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    finding = machine.room(tmp_path / "file" / "below", GIB, "a run", "elsewhere")
    assert finding == Finding("warning", f"{tmp_path}/file/below: no right to write in {tmp_path}/file", "elsewhere")


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_a_folder_is_written_to_with_the_rights_to_write_and_to_enter(lacking, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & lacking)
    finding = machine.room(tmp_path, 0, "a run", "elsewhere")
    assert finding == Finding("warning", f"{tmp_path}: no right to write in {tmp_path}", "elsewhere")


def test_a_full_disk_is_told_what_wants_how_much_of_it(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB, 0))
    advice = [check().advice.partition(";")[0] for check in (machine.here, machine.hub_cache, machine.encoded_data)]
    assert advice == [
        "a run of a 7B base wants 5 GiB", "a 7B base wants 20 GiB", "a data set of 250 million tokens wants 1 GiB",
    ]  # fmt: skip


def test_the_folders_are_those_that_training_uses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "encoded"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models"))
    assert machine.here().found.startswith(f"{tmp_path}: ")
    assert machine.encoded_data().found.startswith(f"{tmp_path}/encoded: ")
    assert machine.hub_cache().found.startswith(f"{tmp_path}/models: ")


# --- hub and tools --------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch):
    """A hub that answers as told; what it is asked."""
    asked = []

    def answers(answer, token=None):
        def status(url, token):
            asked.append((url, token))
            return answer

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
        monkeypatch.setattr(tools, "status", status)
        return asked

    return answers


def test_offline_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(tools, "ask", raises(AssertionError("it was asked")))
    assert tools.hub().state == "note"


@pytest.mark.parametrize(
    ("answer", "token", "state", "words"),
    [
        (200, None, "ok", "answers; no token"),
        (200, "hf_secret", "ok", "takes the token"),
        (401, "hf_secret", "warning", "refuses the token"),
        (503, None, "note", "answers 503"),
        ("timed out", "hf_secret", "note", "cannot be reached (timed out)"),
    ],
)
def test_the_hub_is_never_an_error_and_the_token_never_shown(answer, token, state, words, online):
    asked = online(answer, token)
    finding = tools.hub()
    assert finding.state == state
    assert words in finding.found
    assert "hf_secret" not in finding.found + finding.advice
    assert asked == [(f"https://hub.invalid{'/api/whoami-v2' if token else ''}", token)]


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    from threading import Event

    monkeypatch.setattr(tools, "SECONDS", 0.05)
    never = Event()
    monkeypatch.setattr(tools, "status", lambda url, token: never.wait(10))
    assert tools.ask("https://hub.invalid", None) == "no answer within 0.05 s"
    never.set()


def test_what_a_connection_can_end_with(monkeypatch):
    def ends(error):
        monkeypatch.setattr("urllib.request.urlopen", raises(error))
        return tools.status("https://hub.invalid", "hf_secret")

    assert ends(urllib.error.HTTPError("", 403, "Forbidden", {}, None)) == 403
    assert ends(urllib.error.URLError(OSError("Name or service not known"))) == "OSError: Name or service not known"
    assert ends(TimeoutError()) == "TimeoutError"
    assert tools.status("hub", None) == "ValueError: unknown url type: 'hub'"


def test_the_token_is_for_the_hub_alone_and_not_for_where_it_redirects_to(monkeypatch):
    class Answer:
        status = 200

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def urlopen(request, timeout):
        assert request.unredirected_hdrs == {"Authorization": "Bearer hf_secret"}
        assert request.headers == {}
        return Answer()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert tools.status("https://hub.invalid", "hf_secret") == 200


def test_the_sandbox_is_named_or_what_to_install(monkeypatch):
    monkeypatch.setattr("ibft.evaluation.sandbox.find_tier", lambda: "namespaces")
    assert tools.sandbox() == Finding("ok", "namespaces: programs under test are isolated")
    refusal = SetupError("no sandbox for programs here; install bubblewrap")
    monkeypatch.setattr("ibft.evaluation.sandbox.find_tier", raises(refusal))
    finding = tools.sandbox()
    assert (finding.state, finding.found) == ("warning", str(refusal))


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Icarus Verilog version 11.0 (stable) ()", "ok"),
        ("Icarus Verilog version 13.0 (devel) (s20221226)", "ok"),
        ("Icarus Verilog version 10.3 (stable) ()", "warning"),
        ("", "warning"),
        (None, "warning"),
    ],
)
def test_icarus_from_11_on(said, state, monkeypatch):
    monkeypatch.setattr("ibft.evaluation.verilog_judge.icarus_version", lambda: said)
    finding = tools.icarus()
    assert finding.state == state
    assert finding.found
    assert ("apt-get install iverilog" in finding.advice) == (state == "warning")


def test_first_lines():
    assert first_line("\n  driver is gone \nat 3") == "driver is gone"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line("") == ""
