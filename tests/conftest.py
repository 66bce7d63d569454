"""Set before anything imports triton: without a CUDA device its kernels run in the interpreter, on CPU tensors."""

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# cuBLAS refuses to run under torch.use_deterministic_algorithms (which poisons memory in tests/ops) without it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, as of this one below
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["IBFT_CACHE"] = tempfile.mkdtemp(prefix="ibft-cache-")  # nothing of the user's, and each process its own

import pytest
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

_common = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],  # shrinking a failing training step takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=25, **_common)
settings.register_profile("soak", max_examples=500, **_common)
settings.load_profile("default")


@pytest.fixture(scope="session")
def soaking(request) -> bool:
    """Under `make soak`: all of them instead of a few."""
    return request.config.getoption("--hypothesis-profile") == "soak"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`make test` has two processes. A file of tests stays in one of them, and all files that start sandboxes stay
    together: some of those tests look for any that are left. (xdist 3.8 reads no groups from pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            alone = ("tests/evaluation/", "tests/test_cli.py", "tests/test_page_commands.py", "tests/test_estimate.py")
            return "sandboxes" if file.startswith(alone) else file

    config.option.loadscopereorder = False  # or files of one test come last, which take the longest
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _torch_ops_outside_tests_ops(request, monkeypatch):
    """On a CPU the interpreter is for tests of the kernels; the trainer's tests use the torch path, as its users do."""
    if "ops" not in request.path.parent.parts:
        from ibft_kernels import _dispatch

        monkeypatch.setattr(_dispatch, "INTERPRETED", False)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps device and precision in process-wide singletons; each test chooses its own."""
    yield
    import sys

    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
