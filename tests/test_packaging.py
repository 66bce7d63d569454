"""What is built and published is whole: from the wheel alone, away from the source, a run starts and trains."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 20 * 2**20  # bytes
NEEDED = {
    "ibft/py.typed", "ibft_kernels/py.typed", "ibft/presets/paper-evol.yaml", "ibft/recipes/tiny.yaml",
    "ibft/tiny/base/model.safetensors", "ibft/tiny/base/tokenizer.json", "ibft_kernels/launch/sm_90.json",
    "ibft/evaluation/inside/enter.py", "ibft/integrations/trainer.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist); the wheel is made of the sdist, as `python -m build` does it."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_what_it_needs_and_no_more(built):
    wheel, sdist = built
    assert wheel.stat().st_size < LARGEST
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= NEEDED, sorted(NEEDED - names)
    own = {f"ibft/{path.relative_to(ROOT / 'ibft')}" for path in (ROOT / "ibft").rglob("*.py")}
    own |= {
        f"ibft_kernels/{path.relative_to(ROOT / 'kernels/ibft_kernels')}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert own <= names, sorted(own - names)
    assert {name.split("/")[0] for name in names} - {"ibft", "ibft_kernels"} == {"ibft_fast-0.1.0.dist-info"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "setup.py", "kernels/ibft_kernels/__init__.py"} <= inside


def test_from_the_wheel_alone_a_run_trains_in_an_empty_folder(built, tmp_path):
    """Its dependencies are those of this environment; the package is the wheel's."""
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    zipfile.ZipFile(built[0]).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    program = "import sys, ibft; print(ibft.__file__, file=sys.stderr); from ibft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "train.max_steps=2", "eval.max_tasks=1", "eval.max_new_tokens=1",
         "data.max_samples=8", "-o", "run"],
        cwd=here, env=environment | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.splitlines()[0] == str(site / "ibft" / "__init__.py")
    assert (here / "run" / "adapter" / "adapter_model.safetensors").is_file()
