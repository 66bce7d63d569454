"""The GPU: its driver, what torch makes of it, and a kernel and a 4-bit weight that really go through it."""

import logging
import re
import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING

from ibft.doctor.finding import Finding, first_line

if TYPE_CHECKING:
    import torch

SECONDS = 20  # a driver that hangs is one that does not answer
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
NO_GPU = "no GPU"
FOR_CPU = "the bundled model trains on the CPU in minutes; one of 7B wants a GPU"
CUDA_BUILD = "install torch's CUDA build: https://pytorch.org"
COMPILER = "Triton needs a C compiler and Python's headers (Debian: apt-get install gcc python3-dev)"
REINSTALL = "reinstall torch, and triton with it"
AHEAD = ("ib_kl_forward", "bf16", 80)  # kernel, dtype and architecture to compile where there is no GPU
KERNEL_ERROR = 1e-4  # fp32; two implementations of one formula
NF4_ERROR = 0.2  # of the largest value: half the widest gap between two of the 16 values is 0.152


def driver() -> Finding:
    if shutil.which(QUERY[0]) is None:
        return Finding("note", "nvidia-smi is not installed: no NVIDIA GPU, or no driver", FOR_CPU)
    try:
        made = subprocess.run(QUERY, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding("warning", f"nvidia-smi does not answer within {SECONDS} s", "restart the machine")
    said = made.stdout.strip() or made.stderr.strip()
    if made.returncode != 0 or not said:
        why = first_line(said) or f"exit code {made.returncode}"
        return Finding("warning", f"nvidia-smi fails: {why}", "after an update of the driver: restart the machine")
    return Finding("ok", "; ".join(line.strip() for line in said.splitlines()))


def cuda() -> Finding:
    """What torch can use of it, and in which precision `train.mixed_precision=auto` computes there."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if driver().state != "ok":
            return Finding("note", NO_GPU)
        if torch.version.cuda is None:
            return Finding("warning", "there is a GPU, and torch is built for the CPU", CUDA_BUILD)
        why = f": {first_line(said[0].message.args[0])}" if said and isinstance(said[0].message, Warning) else ""
        advice = "update the driver, or install torch for an older CUDA; CUDA_VISIBLE_DEVICES may hide the GPU"
        return Finding("warning", f"torch for CUDA {torch.version.cuda} finds no device{why}", advice)
    from ibft_kernels._launch import ARCHITECTURES

    major, minor = torch.cuda.get_device_capability()
    precision = "bf16" if (major, minor) >= (8, 0) else "no bf16, so fp16"
    found = f"{torch.version.cuda}, {torch.cuda.get_device_name()}, compute capability {major}.{minor}, {precision}"
    if 10 * major + minor < ARCHITECTURES[0]:
        oldest = f"{ARCHITECTURES[0] // 10}.{ARCHITECTURES[0] % 10}"
        return Finding("warning", found, f"the kernels are for {oldest} and newer: if Triton fails, runtime.device=cpu")
    return Finding("ok", found)


def several() -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return Finding("ok" if count else "note", str(count) if count else NO_GPU)
    command = f"torchrun --nproc_per_node {count} -m ibft.cli train ..."
    return Finding("ok", f"{count}; one process uses one", f"all of them: {command} (docs/several-gpus.md)")


def memory() -> Finding:
    import torch

    from ibft.memory import free_memory

    if not torch.cuda.is_available():
        return Finding("note", NO_GPU)
    device = torch.device("cuda")
    _, total = torch.cuda.mem_get_info(device)
    free = free_memory(device) or 0
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < total / 2:
        return Finding("warning", found, "other processes hold the rest: nvidia-smi lists them")
    return Finding("ok", found, "what a run takes: ibft-fast estimate")


def kernels() -> Finding:
    """On a GPU one of the project's kernels runs, and agrees with PyTorch; without one a kernel is compiled for one."""
    import torch

    from ibft_kernels import _dispatch
    from ibft_kernels._triton import HAVE_TRITON

    on_gpu = torch.cuda.is_available()
    if not HAVE_TRITON:
        return Finding("missing", "not installed", "pip install triton") if on_gpu else Finding("note", "not installed")
    if _dispatch.INTERPRETED:
        return Finding("warning", "TRITON_INTERPRET is set: kernels run in the interpreter", "unset TRITON_INTERPRET")
    if not on_gpu:
        return compiled_ahead()
    try:
        error = kernel_error(torch.device("cuda"))
    except Exception as failure:  # of the compiler, the launcher or the driver
        advice = COMPILER if re.search(r"compiler|gcc|Python\.h", str(failure)) else REINSTALL
        return Finding("missing", f"ib_kl_loss does not run: {first_line(failure)}", advice)
    if not error <= KERNEL_ERROR:  # NaN is none
        return Finding("missing", f"ib_kl_loss is off by {error:.1e} from torch", REINSTALL)
    return Finding("ok", f"ib_kl_loss runs on the GPU, within {error:.1e} of torch")


def compiled_ahead() -> Finding:
    from ibft_kernels.aot import compile_one

    kernel, dtype, architecture = AHEAD
    row = compile_one(kernel, dtype, architecture)
    if row.error:
        return Finding("warning", f"{kernel} does not compile for sm_{architecture}: {row.error}", REINSTALL)
    return Finding("note", f"no GPU to run on; {kernel} compiles for sm_{architecture}, {row.registers} registers")


def kernel_error(device: "torch.device") -> float:
    """Largest difference of z [33, 64], KL and both gradients of `ib_kl_loss` between the triton and torch backends."""
    import torch

    from ibft_kernels import ib_kl_loss

    inputs = torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for backend in ("triton", "torch"):
        mu, logvar = (x.clone().requires_grad_() for x in inputs)
        z, kl = ib_kl_loss(mu, logvar, seed=0, reduction="batchmean", backend=backend)
        gradients = torch.autograd.grad(z.sum() + kl, (mu, logvar))
        results.append(torch.cat([x.detach().flatten() for x in (z, kl, *gradients)]))
    return (results[0] - results[1]).abs().max().item()


def four_bits() -> Finding:
    """bitsandbytes quantises the base: a weight goes to NF4 and back on the device that trains."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except Exception as error:  # at import it looks for its libraries
        return Finding("missing", f"cannot be imported: {first_line(error)}", "pip install -U bitsandbytes")
    on_gpu = torch.cuda.is_available()
    if on_gpu and not getattr(lib, "compiled_with_cuda", False):
        built = f"{bitsandbytes.__version__} has no library for CUDA {torch.version.cuda}"
        return Finding("missing", built, "pip install -U bitsandbytes; python -m bitsandbytes says more")
    found = f"{bitsandbytes.__version__}: NF4 and back on the {'GPU' if on_gpu else 'CPU'}"
    try:
        off = nf4_error(torch.device("cuda" if on_gpu else "cpu"))
    except Exception as failure:  # of its library, or of the driver
        return Finding("missing", f"{found} fails: {first_line(failure)}", "python -m bitsandbytes says more")
    if not off <= NF4_ERROR:
        return Finding("missing", f"{found} is off by {off:.1e} of the largest value", "reinstall bitsandbytes")
    return Finding("ok", found)


def nf4_error(device: "torch.device") -> float:
    """Largest error of a weight [64, 64] that went to NF4 and back, as a share of the weight's largest value."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return ((dequantize_4bit(packed, state) - weight).abs().max() / weight.abs().max()).item()
