"""Break each kernel on purpose: for every breakage below, a named test must fail.

    python tests/ops/breakages.py [NAME ...]        all of them, or those of that name, or whose name contains it

Each breakage is one replacement in the source of a copy of the package. The tests that should catch it run on that
copy in a process of their own, forked from one that has imported torch and Triton. `test_breakages.py` runs the list.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # another test runs beside it
CPU_SECONDS = 60  # of one child; the longest sound one takes 15
TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "kernels" / "ibft_kernels"


@dataclass(frozen=True)
class Breakage:
    """`old` (once in `file`, or the `nth` of several) becomes `new`; `tests` is a node below tests/ops."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    nth: int | None = None


def broken(source: str, breakage: Breakage) -> str:
    parts = source.split(breakage.old)
    found = len(parts) - 1
    if found != 1 if breakage.nth is None else breakage.nth >= found:
        raise LookupError(f"{breakage.name}: {breakage.old!r} occurs {found} times in {breakage.file}")
    at = 1 + (breakage.nth or 0)
    return breakage.old.join(parts[:at]) + breakage.new + breakage.old.join(parts[at:])


def runs_red(breakage: Breakage | None, tests: str, folder: Path) -> bool:
    """Whether `tests` fail on a copy of the package in `folder` with the breakage (None: as it is)."""
    shutil.copytree(PACKAGE, folder / "ibft_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if breakage is not None:
        file = folder / "ibft_kernels" / breakage.file
        file.write_text(broken(file.read_text(encoding="utf-8"), breakage), encoding="utf-8")
    child = os.fork()
    if child == 0:
        os._exit(_child(tests, folder))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1) and code >= 0:  # neither passed nor failed: nothing collected, or the copy does not import
        raise RuntimeError(f"{breakage.name if breakage else 'unbroken'}: {tests} ended with pytest's exit code {code}")
    return code != 0  # below 0: killed by a signal. A store outside its tensor can crash or never end


def _child(tests: str, folder: Path) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    sys.path.insert(0, str(folder))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    nodes = [str(TESTS / node) for node in tests.split()]
    code = int(pytest.main(["-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "-p", "no:randomly", *nodes]))
    import ibft_kernels

    return code if Path(ibft_kernels.__file__).is_relative_to(folder) else 3


def main(names: list[str]) -> int:
    """Exit status 1 if a breakage passes unnoticed, or a test is red without one."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # imported here, once, for every child
    import bitsandbytes.functional  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest_benchmark.plugin  # noqa: F401
    import sympy  # noqa: F401
    import torch._dynamo
    import transformers.models.llama.modeling_llama  # noqa: F401
    import triton.runtime.interpreter  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or pytest's last act in every child is to look through all of that

    exact = {b.name for b in BREAKAGES}.intersection(names)
    parts = [name for name in names if name not in exact]
    chosen = [b for b in BREAKAGES if not names or b.name in exact or any(part in b.name for part in parts)]
    by_file: dict[str, set[str]] = {}  # without a breakage a process for each file of tests, not for each test
    for node in {node for b in chosen for node in b.tests.split()}:
        by_file.setdefault(node.partition("::")[0], set()).add(node)
    jobs = [(None, " ".join(sorted(nodes))) for _, nodes in sorted(by_file.items())] + [(b, b.tests) for b in chosen]
    workers = []
    for share in range(WORKERS):
        worker = os.fork()
        if worker == 0:
            os._exit(_work(jobs[share::WORKERS]))
        workers.append(worker)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    gc.unfreeze()  # or libraries would complain of leaks at the end
    print(f"{len(chosen)} breakages, {'all caught' if not any(codes) else 'see above'}")
    return 1 if any(codes) else 0


def _work(jobs: list[tuple[Breakage | None, str]]) -> int:
    """Exit status of a worker: 1 if any of its jobs came out wrong."""
    wrong = 0
    for breakage, tests in jobs:
        try:
            with tempfile.TemporaryDirectory() as folder:
                red = runs_red(breakage, tests, Path(folder))
        except (LookupError, RuntimeError) as error:
            print(f"ERROR     {error}", flush=True)
            wrong = 1
            continue
        if breakage is None:
            if red:
                print(f"RED WITHOUT A BREAKAGE  {tests}", flush=True)
            wrong |= red
        else:
            print(f"{'caught' if red else 'UNNOTICED':<10}{breakage.name}", flush=True)
            wrong |= not red
    return int(wrong)


PHILOX, DROPOUT, KL = "ops/_philox_triton.py", "ops/dropout.py", "ops/_ib_kl_triton.py"
BOTTLENECK, LORA = "ops/_ib_bottleneck_triton.py", "ops/ib_lora_backward.py"
CE, CE_LOOP, SCATTER = "ops/_cross_entropy_triton.py", "ops/linear_cross_entropy.py", "ops/_scatter_rows.py"
FOLD, OBJECTIVE, NF4 = "ops/fold.py", "ops/objective.py", "ops/nf4.py"
RMS, SWIGLU, ROPE = "ops/rms_norm.py", "ops/swiglu.py", "ops/rope.py"
LAYER, MLP, TAP, OWNERSHIP = "ops/lora.py", "ops/lora_mlp.py", "ops/ib_lora_mlp.py", "_ownership.py"

_PHILOX, _DROPOUT, _KL, _IB = "test_philox.py::", "test_dropout.py::", "test_ib_kl.py::", "test_ib_bottleneck.py::"
_PHILOX_WORDS = _PHILOX + "test_words_equal_the_reference_bit_for_bit"
_PHILOX_NORMALS = _PHILOX + "test_normals_equal_the_float64_truth"
_DROPOUT_EQUAL = _DROPOUT + "test_equals_the_reference"
_KL_EQUAL = _KL + "test_equals_float64_reference[triton-cpu-252-7-dtype0-1e-14]"
_KL_REDUCE = _KL + "test_reductions_masks_and_normalizers"
_IB_EQUAL = _IB + "test_equals_float64_reference"
_LORA = "test_ib_lora_backward.py::"
_LAYERS, _OWNS = "test_lora.py::", "test_ownership.py::"
_LORA_EQUAL = _LORA + "test_equals_autograd_in_float64"
_LORA_SCALED = _LORA + "test_the_scaling_is_a_number_of_the_call"
_LCE = "test_linear_cross_entropy.py::"
_LCE_CHUNKS = _LCE + "test_the_chunking_changes_rounding_only"
_LCE_TORCH = _LCE + "test_equals_the_float64_reference[torch-cpu-252-123-507-dtype0-1e-13]"
_LCE_EQUAL = _LCE + "test_equals_the_float64_reference[triton-cpu-252-123-507-dtype0-1e-13]"
_NF4 = "test_nf4_dequantize.py::"
_NF4_EQUAL = _NF4 + "test_equals_bitsandbytes"
_RMS, _SWIGLU, _ROPE = "test_rms_norm.py::", "test_swiglu.py::", "test_rope.py::"
_RMS_EQUAL = _RMS + "test_equals_float64_reference[triton-cpu-70-507-dtype0-1e-13]"
_RMS_TORCH = _RMS + "test_equals_float64_reference[torch-cpu-70-507-dtype0-1e-13]"
_SWIGLU_EQUAL = _SWIGLU + "test_equals_float64_reference[triton-cpu-70-507-dtype0-1e-14]"
_SWIGLU_TORCH = _SWIGLU + "test_equals_float64_reference[torch-cpu-70-507-dtype0-1e-14]"
_ROPE_EQUAL = _ROPE + "test_equals_float64_reference[triton-cpu-80-dtype0-1e-15]"
_ROPE_TORCH = _ROPE + "test_equals_float64_reference[torch-cpu-80-dtype0-1e-15]"
BREAKAGES = [
    # philox
    Breakage("philox: wrong counter word", PHILOX, "zero_nj + sample_n[:, None]", "zero_nj + position_n[:, None]",
             _PHILOX_WORDS),
    Breakage("philox: epoch and position exchanged", PHILOX, "epoch_n = tl.load(ids_ptr + rows_n * 3,",
             "epoch_n = tl.load(ids_ptr + rows_n * 3 + 2,", _PHILOX_WORDS),
    Breakage("philox: every row the first", PHILOX, "position_n = rows_n.to(tl.int32)",
             "position_n = tl.zeros_like(rows_n.to(tl.int32))", _KL + "test_noise_ids_default_to_the_row_number"),
    Breakage("philox: high half of the key lost", PHILOX, "(seed_hi.to(tl.int64) << 32) |", "0 |", _PHILOX_WORDS),
    Breakage("philox: a column group too far", PHILOX, "group_j = first_column // 4 + ", "group_j = 1 + ",
             _PHILOX_NORMALS),
    Breakage("philox: sine for cosine", PHILOX, "_sin_turns(tl.abs(u - 0.5) - 0.25)", "_sin_turns(tl.abs(u - 0.5))",
             _PHILOX_NORMALS),
    Breakage("philox: a uniform may be 0", PHILOX, ".to(tl.float32) + 0.5)", ".to(tl.float32))", _PHILOX_NORMALS),
    Breakage("philox: rows not masked", PHILOX, "mask=mask_n[:, None] & (columns_c < n_columns)[None, :]",
             "mask=(rows_n >= 0)[:, None] & (columns_c < n_columns)[None, :]", _PHILOX_NORMALS),
    # dropout
    Breakage("dropout: the complement", DROPOUT, "tl.where(bits >= threshold", "tl.where(bits < threshold",
             _DROPOUT_EQUAL),
    Breakage("dropout: the threshold itself", DROPOUT, "tl.where(bits >= threshold", "tl.where(bits > threshold",
             _DROPOUT + "test_the_threshold_is_exact"),
    Breakage("dropout: not scaled", DROPOUT, "scale = tl.div_rn(65536.0, kept)", "scale = kept / kept",
             _DROPOUT_EQUAL),
    Breakage("dropout: four columns a call", DROPOUT, "first // 8 + tl.arange", "first // 4 + tl.arange",
             _DROPOUT_EQUAL),
    Breakage("dropout: does not add", DROPOUT, "y += tl.load(y_ptrs", "y += 0 * tl.load(y_ptrs",
             _DROPOUT + "test_adding_a_gradient_to_others"),
    Breakage("dropout: wrong row stride of the sum", DROPOUT, "rows_n[:, None] * stride_yn",
             "rows_n[:, None] * n_columns", _DROPOUT + "test_adding_a_gradient_to_others"),
    Breakage("dropout: wrong row stride", DROPOUT, "rows_n[:, None] * stride_xn", "rows_n[:, None] * n_columns",
             _DROPOUT + "test_strided_input_and_gradient"),
    # ib_kl
    Breakage("ib_kl: wrong sign of logvar", KL, "mu * mu - 1.0 - logvar", "mu * mu - 1.0 + logvar", _KL_EQUAL),
    Breakage("ib_kl: padding columns counted", KL, "tl.where(mask_nz, std * std + mu * mu - 1.0 - logvar, 0.0)",
             "std * std + mu * mu - 1.0 - logvar", _KL + "test_clamps"),
    Breakage("ib_kl: tokens not masked", KL, "kl_n = tl.where(counted_n, kl_n, 0.0)", "kl_n = kl_n", _KL_REDUCE),
    Breakage("ib_kl: off by one row", KL, "rows_n[:, None] * stride_lvn", "(rows_n ^ 1)[:, None] * stride_lvn",
             _KL_EQUAL, nth=0),
    Breakage("ib_kl: logvar not clamped", KL, "logvar = _clamped(raw, LO, HI)", "logvar = raw", _KL_EQUAL),
    Breakage("ib_kl: NaN clamped away", KL, "tl.PropagateNan.ALL", "tl.PropagateNan.NONE",
             _KL + "test_nan_is_not_hidden", nth=1),
    Breakage("ib_kl: gradient beyond the clamp", KL, "dlogvar = tl.where(inside, dlogvar, 0.0)", "dlogvar = dlogvar",
             _KL_EQUAL),
    Breakage("ib_kl: gradient not at the bound", KL, "(raw <= tl.full([], HI, COMPUTE))",
             "(raw < tl.full([], HI, COMPUTE))", _KL + "test_clamp_gradient_passes_at_the_bounds_and_stops_beyond"),
    Breakage("ib_kl: other noise in backward", KL, "twice += dz * eps * std", "twice += dz * std * tl.abs(eps)",
             _KL + "test_backward_recomputes_the_same_noise"),
    Breakage("ib_kl: gradient of masked tokens", KL,
             "tl.where(tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0, g_n, 0.0)", "g_n", _KL_REDUCE),
    Breakage("ib_kl: half of dlogvar forgotten", KL, "dlogvar = 0.5 * twice", "dlogvar = twice", _KL_EQUAL),
    Breakage("ib_kl: partial sums of the first block", KL, "total_b += tl.load", "total_b = tl.load",
             _KL + "test_more_partials_than_one_block"),
    # ib_bottleneck
    Breakage("bottleneck: mu and logvar exchanged", BOTTLENECK, "mu, raw = tl.split", "raw, mu = tl.split", _IB_EQUAL),
    Breakage("bottleneck: K not masked", BOTTLENECK, "mask_k = offs_k < n_hidden - first_k", "mask_k = offs_k >= 0",
             _IB_EQUAL),
    Breakage("bottleneck: bias forgotten", BOTTLENECK, "acc_np += tl.load(b_ptr + rows_p).to(tl.float32)[None, :]",
             "acc_np += 0.0", _IB_EQUAL),
    Breakage("bottleneck: noise of the first tile", BOTTLENECK,
             "mask_n, first, columns_z, mask_nz, tl.float32", "mask_n, 0, columns_z, mask_nz, tl.float32",
             _IB + "test_noise_of_every_latent_tile"),
    Breakage("bottleneck: a token counts once a tile", BOTTLENECK,
             "tl.where(tile_z == 0, tl.sum(counted_n.to(tl.int32), axis=0), 0)",
             "tl.sum(counted_n.to(tl.int32), axis=0)",
             _IB + "test_small_tiles"),
    Breakage("bottleneck: row KL of the first tile", BOTTLENECK, "row_kl[0] if z_tiles == 1 else row_kl.sum(dim=0)",
             "row_kl[0]", _IB + "test_small_tiles"),
    Breakage("bottleneck: half of dlogvar forgotten", BOTTLENECK, "dlogvar = 0.5 * twice", "dlogvar = twice",
             _IB_EQUAL),
    Breakage("bottleneck: dmu alone reaches hidden", BOTTLENECK, "dh_nd = tl.dot(dlv_nz, w_lv_zd, dh_nd,",
             "dh_nd = tl.dot(dmu_nz, w_mu_zd,", _IB_EQUAL),
    Breakage("bottleneck: buffer overwritten", BOTTLENECK, "dh_nd += tl.load(g_ptrs", "dh_nd += 0 * tl.load(g_ptrs",
             "test_ib_bottleneck_ops.py::test_adds_into_a_strided_buffer_and_touches_nothing_else"),
    Breakage("bottleneck: last columns of a split", BOTTLENECK, "split_tiles=triton.cdiv(column_tiles, splits)",
             "split_tiles=column_tiles // splits", _IB + "test_small_tiles"),
    Breakage("bottleneck: dmu stored for dlogvar", BOTTLENECK, "pair_offsets + n_latent, dlv_nz",
             "pair_offsets + n_latent, dmu_nz", _IB_EQUAL),
    # ib_lora_backward
    Breakage("lora: scaling dropped", BOTTLENECK, "(scaling * dlora_nr)", "(dlora_nr)", _LORA_SCALED),
    Breakage("lora: what arrives from above dropped", BOTTLENECK, "dh_nd += tl.load(g_ptrs",
             "dh_nd += 0 * tl.load(g_ptrs", _LORA_EQUAL),
    Breakage("lora: multiplied before the sum", BOTTLENECK, "low_nd = dh_nd.to(",
             "low_nd = (dh_nd - tl.load(g_ptrs + first_d, mask=mask_nd, other=0.0)).to(", _LORA_EQUAL),
    Breakage("lora: dlogvar's half forgotten", BOTTLENECK, "dh_nd = tl.dot(dlv_nz, w_lv_zd, dh_nd,",
             "dh_nd = tl.dot(dmu_nz, w_mu_zd,", _LORA_EQUAL),
    Breakage("lora: B's first tile for all", BOTTLENECK, "lora_ptrs + first_d.to(tl.int64) * n_rank", "lora_ptrs",
             _LORA_EQUAL),
    Breakage("lora: the last tile alone", BOTTLENECK, "lora_dr, dlora_nr, input_precision", "lora_dr, input_precision",
             _LORA_EQUAL),
    Breakage("lora: B's rows not masked", BOTTLENECK, "mask_dr = mask_d[:, None] & mask_r[None, :]",
             "mask_dr = (offs_d >= 0)[:, None] & mask_r[None, :]",
             _LORA + "test_what_lies_beside_a_tensor_is_not_read"),
    Breakage("lora: the first split's part alone", BOTTLENECK, "dlora_SNR[0] if splits == 1 else dlora_SNR.sum(dim=0)",
             "dlora_SNR[0] if splits > 0 else dlora_SNR.sum(dim=0)", _LORA + "test_small_tiles"),
    Breakage("lora: every split in one place", BOTTLENECK, "tl.program_id(1).to(tl.int64) * n_rows + rows_n", "rows_n",
             _LORA + "test_small_tiles"),
    Breakage("lora: gradient of masked tokens", BOTTLENECK,
             "g_n = tl.where(tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0, g_n, 0.0)", "g_n = g_n",
             _LORA + "test_reductions_and_masks"),
    Breakage("lora: rows of dhidden as of the total", BOTTLENECK, "rows_n[:, None] * stride_gn",
             "rows_n[:, None] * n_hidden", _LORA + "test_inplace_writes_into_that_buffer_and_nowhere_else"),
    Breakage("lora: buffer overwritten by the product", "ops/ib_bottleneck.py", "torch.addmm(g_ND, pair_N2Z, w_2ZD,",
             "torch.addmm(g_ND, pair_N2Z, w_2ZD, beta=0,", _LORA_EQUAL),
    Breakage("lora: noise not drawn again", LORA, "if spec.backend == \"torch\" and eps is None and dz_NZ is not None:",
             "if False:", _LORA + "test_noise_is_philox"),
    Breakage("lora: product not scaled", LORA, "beta=0.0, alpha=scaling", "beta=0.0, alpha=1.0", _LORA_SCALED),
    # linear_cross_entropy: kernel
    Breakage("ce: wrong sign of the one-hot", CE, "- tl.where(columns_v == label", "+ tl.where(columns_v == label",
             _LCE_EQUAL),
    Breakage("ce: loss not masked", CE, "tl.where(counted, logsumexp - x_label, 0.0)", "logsumexp - x_label",
             _LCE + "test_reductions_and_rows"),
    Breakage("ce: gradient of ignored rows", CE, "gradient = tl.where(counted, gradient, 0.0)", "gradient = gradient",
             _LCE + "test_reductions_and_rows"),
    Breakage("ce: off by one row", CE, "label = tl.load(labels_ptr + row)", "label = tl.load(labels_ptr + (row ^ 1))",
             _LCE_EQUAL),
    Breakage("ce: padding counted", CE, 'other=float("-inf")).to(COMPUTE)', "other=0.0).to(COMPUTE)",
             _LCE_EQUAL),
    Breakage("ce: maximum not taken out", CE, "new_b = tl.maximum(max_b, x)", "new_b = tl.zeros_like(x)",
             _LCE + "test_extreme_logits"),
    Breakage("ce: sum not rescaled", CE, "sum_b * tl.exp(max_b - new_b) +", "sum_b +",
             _LCE + "test_rows_wider_than_a_block"),
    Breakage("ce: store not masked", CE, "gradient.to(logits_ptr.dtype.element_ty), mask=mask_v)",
             "gradient.to(logits_ptr.dtype.element_ty))", _LCE_EQUAL),
    Breakage("ce: bias left out of the gradient", CE, "if bias_ptr is not None:\n        x += ",
             "if bias_ptr is None:\n        x += ", _LCE_EQUAL),
    Breakage("ce: a label out of range passes", CE, 'mask=in_range, other=float("nan")', "mask=in_range, other=0.0",
             _LCE + "test_the_kernel_marks_a_label_out_of_range"),
    # its chunk loop
    Breakage("loop: labels of the first chunk", CE_LOOP, "head.visit(part, rows_m, labels[part],",
             "head.visit(part, rows_m, labels[: part.stop - part.start],", _LCE_CHUNKS),
    Breakage("loop: dW of the last chunk only", CE_LOOP, "beta = 0 if first else 1", "beta = 0", _LCE_CHUNKS),
    Breakage("loop: rows of the wrong chunk", CE_LOOP, "None if rows is None else rows[part]",
             "None if rows is None else rows[: part.stop - part.start]", _LCE_CHUNKS),
    Breakage("loop: backward forgets the upstream gradient", SCATTER, "scale.contiguous(), rows",
             "torch.ones_like(scale), rows", _LCE + "test_backward_twice_with_retain_graph"),
    Breakage("scatter: off by one row", CE, "target_m = tl.load(rows_ptr + rows_m,",
             "target_m = tl.load(rows_ptr + (rows_m ^ 1),", _LCE_EQUAL),
    Breakage("scatter: one scale for all rows", CE, "rows_m * stride_scale", "rows_m * 0",
             _LCE + "test_reductions_and_rows"),
    # nf4_dequantize
    Breakage("nf4: low nibble first", NF4, "tl.interleave(high_j, low_j)", "tl.interleave(low_j, high_j)", _NF4_EQUAL),
    Breakage("nf4: offset forgotten", NF4, "* nested_b + tl.load(offset_ptr)", "* nested_b", _NF4_EQUAL),
    Breakage("nf4: nested absmax of the first block", NF4, "nested_absmax_ptr + blocks_b // NESTED_BLOCKSIZE",
             "nested_absmax_ptr + blocks_b * 0", _NF4_EQUAL),
    Breakage("nf4: absmax of the first tile", NF4, "blocks_b = first + tl.arange", "blocks_b = tl.arange", _NF4_EQUAL),
    Breakage("nf4: rounded before the scale", NF4, "(packed_j >> 4)) *", "(packed_j >> 4)).to(tl.float16) *",
             _NF4_EQUAL),
    Breakage("nf4: last byte not read", NF4, "mask=bytes_j < n_bytes", "mask=bytes_j < n_weights // 2", _NF4_EQUAL),
    Breakage("nf4: store not masked", NF4, "mask=weights < n_weights)", "mask=weights >= 0)",
             _NF4 + "test_writes_the_start_of_a_given_buffer"),
    Breakage("nf4: multiply-adds allowed", NF4, '{"enable_fp_fusion": False}', '{"enable_fp_fusion": True}',
             _NF4 + "test_the_launcher_forbids_multiply_adds"),
    Breakage("nf4: absmax of the first chunk", NF4, "scale_B[first // blocksize :", "scale_B[0 :",
             _NF4 + "test_the_torch_path_works_in_chunks"),
    # rms_norm
    Breakage("rms: mean over the padding too", RMS, "axis=1) / n_columns + tl.full", "axis=1) / BLOCK_C + tl.full",
             _RMS_EQUAL),
    Breakage("rms: eps in fp32", RMS, "tl.full([], EPS, COMPUTE)", "tl.full([], EPS, tl.float32)", _RMS + "test_eps"),
    Breakage("rms: norm of the unrounded sum", RMS, "h = rounded.to(COMPUTE)", "h += residual.to(COMPUTE)",
             _RMS + "test_y_is_the_norm_of_the_h_that_goes_on"),
    Breakage("rms: rounded after the weight only", RMS, "(h * rstd_n[:, None]).to(element).to(COMPUTE)",
             "h * rstd_n[:, None]", _RMS + "test_the_normalised_value_rounds_before_the_weight"),
    Breakage("rms: wrong row stride", RMS, "rows_n[:, None] * stride_rn", "rows_n[:, None] * stride_xn",
             _RMS + "test_strided_rows_are_read_in_place"),
    Breakage("rms: rows cut at 256 columns", RMS, "block_c = max(16, 1 <<", "block_c = min(256, 1 <<", _RMS_EQUAL),
    Breakage("rms: mean gradient not along n", RMS, "(g - n * mean_n[:, None])", "(g - mean_n[:, None])", _RMS_EQUAL),
    Breakage("rms: weight left out of the gradient", RMS, "g = dy * weight_c[None, :]", "g = dy", _RMS_EQUAL),
    Breakage("rms: gradient at h replaces the other", RMS, "dx += tl.load(dh_ptr", "dx = tl.load(dh_ptr", _RMS_EQUAL),
    Breakage("rms: gradient at h forgotten", RMS, "_backward_op(dy, dh, *ctx", "_backward_op(dy, None, *ctx",
             _RMS_TORCH),
    Breakage("rms: gradient at h alone is none", RMS, "        return dh\n", "        return None\n",
             _RMS + "test_partial_gradients"),
    Breakage("rms: saves a copy", RMS, "save_for_backward(h, weight", "save_for_backward(h.clone(), weight",
             _RMS + "test_saved_bytes"),
    # swiglu
    Breakage("swiglu: first columns in every tile", SWIGLU, "tl.program_id(1) * BLOCK_I", "tl.program_id(1) * 0",
             _SWIGLU_EQUAL),
    Breakage("swiglu: columns not masked", SWIGLU, "(columns_i < n_columns)", "(columns_i >= 0)",
             _SWIGLU + "test_halves_of_one_buffer_in_place"),
    Breakage("swiglu: wrong row stride", SWIGLU, "dh_ptr + rows * stride_dn", "dh_ptr + rows * n_columns",
             _SWIGLU + "test_halves_of_one_buffer_in_place"),
    Breakage("swiglu: rounded after the product only", SWIGLU, "s.to(h_ptr.dtype.element_ty).to(COMPUTE)", "s",
             _SWIGLU + "test_h_is_what_transformers_computes"),
    Breakage("swiglu: the same in backward", SWIGLU, "s.to(element).to(COMPUTE) * up", "s * up",
             _SWIGLU + "test_h_is_what_transformers_computes"),
    Breakage("swiglu: derivative of the sigmoid", SWIGLU, "(sigma * (1.0 + gate * (1.0 - sigma)))",
             "(sigma * (1.0 - sigma))", _SWIGLU_EQUAL),
    Breakage("swiglu: dup of sigma", SWIGLU, "(dh * s).to(element)", "(dh * sigma).to(element)", _SWIGLU_EQUAL),
    Breakage("swiglu: overlap not looked for", SWIGLU, "    _check_apart(dh=dh, gate=gate, up=up)\n", "",
             _SWIGLU + "test_shared_memory_is_refused_before_anything_is_written"),
    Breakage("swiglu: halves may reach into the next row", SWIGLU, "% stride <= stride - width", "% stride",
             _SWIGLU + "test_shared_memory_is_refused_before_anything_is_written"),
    # rotate
    Breakage("rope: gradient turned forward", ROPE, "s1, s2 = -s2, -s1", "s1, s2 = s1, s2", _ROPE_EQUAL),
    Breakage("rope: one half of cos for both", ROPE, "tl.load(cos_ptrs + HALF,", "tl.load(cos_ptrs,", _ROPE_EQUAL),
    Breakage("rope: columns of the next half", ROPE, "(columns_d < HALF)[None, None, :]",
             "(columns_d >= 0)[None, None, :]", _ROPE_EQUAL),
    Breakage("rope: heads taken for adjacent", ROPE, "heads_h[None, :, None] * stride_xh",
             "heads_h[None, :, None] * (2 * HALF)", _ROPE + "test_views_are_read_in_place"),
    Breakage("rope: the first tile of heads alone", ROPE, "range(0, n_heads, BLOCK_H)", "range(0, BLOCK_H, BLOCK_H)",
             _ROPE_EQUAL),
    Breakage("rope: frozen tensors turned too", ROPE, "dy is not None and ctx.needs_input_grad[i]", "dy is not None",
             _ROPE + "test_one_launch_forward_and_one_back"),
    # whole LoRA layers
    Breakage("layer: x instead of the dropped x", LAYER, "dropped_ND = dropout.again(x_ND, kept.mask)", "pass",
             _LAYERS + "test_qkv"),
    Breakage("layer: no dropout in dx", LAYER, "dropout.add_(dx_ND, torch.mm(t_NR, shadow.a_RD), kept.mask)",
             "dx_ND.addmm_(t_NR, shadow.a_RD)", _LAYERS + "test_qkv"),
    Breakage("layer: dB unscaled", LAYER, "db if p.scaling == 1 else db.mul_(p.scaling)", "db", _LAYERS + "test_qkv"),
    Breakage("layer: the first reader's dx alone", LAYER, "dx_ND.addmm_(dy_NO, dense(p.weight, dy_NO.dtype))", "pass",
             _LAYERS + "test_qkv"),
    Breakage("layer: shadow of B unscaled", LAYER, "p.lora_b if p.scaling == 1 else p.lora_b * p.scaling", "p.lora_b",
             _LAYERS + "test_qkv"),
    Breakage("layer: a stale shadow goes unnoticed", LAYER, "if versions_of(shadow) != versions:", "if False:",
             _LAYERS + "test_a_shadow_serves_many_calls_until_refreshed"),
    Breakage("layer: biases dropped", LAYER, "None if p.bias is None else p.bias.to(x_ND.dtype)", "None",
             _LAYERS + "test_qkv"),
    Breakage("layer: dA in the activations' dtype", LAYER, "product(t_NR.t(), dropped_ND, masters[0][0])",
             "torch.mm(t_NR.t(), dropped_ND)", _LAYERS + "test_low_precision_is_as_near_the_truth"),
    Breakage("mlp: recomputed without the adapter", MLP,
             "        add_low_rank_((gate_NI, up_NI), kept, spec.wide, spec.shadow.wide)\n", "", _LAYERS + "test_mlp"),
    Breakage("mlp: gate and up saved all the same", MLP, "(None, None) if spec.recompute else (gate_NI, up_NI)",
             "(gate_NI, up_NI)", _LAYERS + "test_saved_bytes"),
    Breakage("mlp: writes into a kept graph", MLP, "elif graph_is_kept():", "elif False:",
             _LAYERS + "test_twice_with_the_graph_kept"),
    Breakage("tap: residual left out", TAP, "h_ND.add_(residual.reshape(h_ND.shape))", "pass",
             _LAYERS + "test_tapped_mlp"),
    Breakage("tap: encoder's gradient of the residual", TAP, "hidden=h_ND,", "hidden=h_ND * 2,",
             _LAYERS + "test_tapped_mlp"),
    Breakage("tap: mask left out of backward", TAP, "mask=None if mask_N is None else mask_N.view(torch.bool)",
             "mask=None", _LAYERS + "test_tapped_mlp"),
    Breakage("ownership: the storage's references alone", OWNERSHIP,
             "(*_counts(grad), sys.getrefcount(grad)) == expected", "_counts(grad)[1:] == expected[1:2]",
             _OWNS + "test_a_residual_that_waits"),
    Breakage("ownership: the object's references left out", OWNERSHIP,
             "(*_counts(grad), sys.getrefcount(grad)) == expected", "_counts(grad) == expected[:2]",
             _OWNS + "test_each_count_counts"),
    Breakage("ownership: strided gradients", OWNERSHIP, "        and grad.is_contiguous()\n", "",
             _OWNS + "test_a_gradient_that_is_not_dense_is_not_owned"),
    Breakage("ownership: somebody holds the gradients", TAP, "        del grads\n", "",
             _LAYERS + "test_the_tap_writes_into_a_gradient_that_is_its_own"),
    Breakage("layer: autocast reaches into backward", LAYER, "with torch.autocast(dys[0].device.type, enabled=False):",
             "if True:", _LAYERS + "test_autocast_does_not_reach_into_a_node"),
    # the torch path, what a CPU runs
    Breakage("torch: rms gradient with the wrong sign", RMS, "addcmul_(h_nc, slope_n1, value=-1.0)",
             "addcmul_(h_nc, slope_n1, value=1.0)", _RMS_TORCH),
    Breakage("torch: rms gradient at h of the first rows", RMS, "g_nc.add_(dh_NC[rows])", "g_nc.add_(dh_NC[:n])",
             _RMS + "test_the_torch_path_works_in_chunks"),
    Breakage("torch: rope gradient turned forward", ROPE, "_product(x, cos, s2, s1, 1) if transposed",
             "_product(x, cos, s1, s2, -1) if transposed", _ROPE_TORCH),
    Breakage("torch: swiglu gradients exchanged", SWIGLU, "torch.mul(s, dh, out=up)", "torch.mul(s, up, out=up)",
             _SWIGLU_TORCH),
    Breakage("torch: swiglu rounds silu for dup", SWIGLU, "up.copy_(s.mul_(wide_dh))", "up.copy_(dh)",
             _SWIGLU + "test_low_precision_against_the_truth"),
    Breakage("torch: sign of the one-hot", CE_LOOP, "torch.full_like(target_b1, -1, dtype=compute)",
             "torch.full_like(target_b1, 1, dtype=compute)", _LCE_TORCH),
    Breakage("torch: gradient of ignored rows", CE_LOOP, "if not none_ignored:", "if False:",
             _LCE + "test_reductions_and_rows"),
    Breakage("torch: a label out of range passes", CE_LOOP, 'loss_m.masked_fill_(outside, float("nan"))', "loss_m",
             _LCE + "test_the_kernel_marks_a_label_out_of_range"),
    Breakage("torch: dW of low precision not summed", CE_LOOP, "acc.add_(torch.mm(a, b))", "acc.copy_(torch.mm(a, b))",
             _LCE + "test_low_precision_against_the_truth"),
    Breakage("torch: scale rounded to bf16", SCATTER, "(src.to(scale.dtype) *", "(src * scale.to(src.dtype) / scale *",
             _LCE + "test_a_small_upstream_gradient_is_not_rounded_to_bf16"),
    Breakage("torch: KL without the variance", "ops/ib_kl.py", "std.square_().sub_(logvar)", "std.mul(0).sub_(logvar)",
             "test_ib_kl.py::test_equals_float64_reference[torch-cpu-252-7-dtype0-1e-14]"),
    # fold and objective
    Breakage("fold: the gradient copied", CE_LOOP, "return made[i].mul_(g)", "return made[i] * g",
             "test_fold.py::test_the_gradient_of_the_fold_exists_once"),
    Breakage("fold: the gradient scaled twice", CE_LOOP, "kept = graph_is_kept() or", "kept = False and",
             "test_fold.py::test_the_gradient_of_the_fold_with_the_graph_kept"),
    Breakage("fold: gradients in low precision", FOLD, "leaf.grad_dtype = torch.float32", "pass",
             "test_fold.py::test_a_low_precision_fold_accumulates_in_fp32"),
    Breakage("objective: head bias dropped", OBJECTIVE, "head, encoder = Linear(*head), Linear(*encoder)",
             "head, encoder = Linear(head[0]), Linear(*encoder)", "test_ib_objective.py::test_equals_the_released_way"),
    Breakage("fold: bias forgotten", FOLD, "bias_V = head_bias.to(exact) if bias_V is None else bias_V + head_bias",
             "bias_V = bias_V", "test_fold.py::test_equals_the_direct_way"),
    Breakage("fold: the last micro-batch only", FOLD, "(made, leaf.grad.to(made.dtype))",
             "(made, leaf.grad.to(made.dtype) * 0.5)", "test_fold.py::test_one_fold_for_all_micro_batches"),
    Breakage("objective: beta left out", OBJECTIVE, "(latent.kl + beta * ce_z)", "(latent.kl + ce_z)",
             "test_ib_objective.py::test_equals_the_released_way"),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
