"""The fast path against PEFT's modules, transformers' modules and plain autograd: same loss, same gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_model_config, tiny_trainer
from transformers import AutoModelForCausalLM

from ibft.context import BatchContext
from ibft.data.collate import collate
from ibft.fused import fuse
from ibft.recompute import set_recompute
from ibft_kernels import LoraProjection, _dispatch
from ibft_kernels.ops import ib_lora_mlp as tap_module

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "deepseek"]
LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        """Weights of about D^-1/2: with narrower ones norms and softmax amplify fp32 rounding past 1e-5."""
        if family not in made:
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family, std=0.08)
        return made[family]

    return folder


def step(folder, *overrides, fused=True, modes=None, lengths=LENGTHS):
    """(loss parts, gradients by name) of a first step over a global batch of two micro-batches."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = tiny_trainer(
        folder, random_samples(lengths), "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2",
        f"train.fused_kernels={fused}", *overrides,
    )  # fmt: skip
    assert bool(trainer.fused.shared) == fused
    if modes:
        set_recompute(trainer.model, trainer.fused, modes)
    randomise_lora(trainer.model)
    trainer.model.train()
    parts = trainer.backward(next(trainer.batches(trainer.data, epoch=1)))
    return parts, gradients(trainer), trainer


def assert_equal(found, expected, tolerance=1e-5):
    (parts, grads, _), (expected_parts, expected_grads, _) = found, expected
    for name in ("loss", "ce", "kl", "ce_z"):
        torch.testing.assert_close(getattr(parts, name), getattr(expected_parts, name), rtol=tolerance, atol=0)
    assert grads.keys() == expected_grads.keys()
    assert len(grads) == 3 * 7 * 2 + 4
    for name, value in expected_grads.items():
        assert value.norm() > 0, name
        assert (grads[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_unfused(folders, family, dropout, packing):
    """fp32, 1e-5; keeping everything, making gate and up again, running blocks again."""
    settings = [f"lora.dropout={dropout}", f"data.packing={packing}"]
    expected = step(folders(family), *settings, fused=False)
    for modes in (None, ["mlp"] * 3, ["full"] * 3, ["none", "full", "mlp"]):
        found = step(folders(family), *settings, modes=modes)
        assert found[2].fused.left_alone == {}
        assert found[2].fused.taps_fused
        assert_equal(found, expected)


def test_checkpointing_of_the_unfused_path(folders):
    assert_equal(
        step(folders("llama"), "train.gradient_checkpointing=true", "lora.dropout=0.3", fused=False),
        step(folders("llama"), "lora.dropout=0.3"),
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["model.quantization=none"],
        ["lora.use_rslora=true", "lora.alpha=7"],
        ["lora.target_modules=[q_proj,v_proj,down_proj]"],
        ["lora.target_modules=[k_proj,up_proj]"],
        ["ib.encoder=mlp"],
        ["ib.alpha=0"],
        ["ib.kl_reduction=mean", "ib.kl_tokens=response"],
    ],
    ids=" ".join,
)
def test_settings(folders, settings):
    (parts, grads, _), (expected_parts, expected, _) = (
        step(folders("llama"), "lora.dropout=0.2", *settings, fused=fused) for fused in (True, False)
    )
    torch.testing.assert_close(parts.loss, expected_parts.loss, rtol=1e-5, atol=0)
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        assert (grads[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_the_truth_as_unfused(folders, family):
    """Distance of every gradient from the fp32 step's: over all, at most a tenth above the unfused bf16 step's."""
    settings = ["lora.dropout=0.2", "data.packing=true"]
    truth = step(folders(family), *settings, fused=False)
    fused, native = (step(folders(family), *settings, "train.mixed_precision=bf16", fused=f) for f in (True, False))
    torch.testing.assert_close(fused[0].loss, truth[0].loss, rtol=2**-7, atol=0)
    total, allowed = 0.0, 0.0
    for name, value in truth[1].items():
        assert fused[1][name].dtype == torch.float32
        off, native_off = (float((run[1][name] - value).norm() / value.norm()) for run in (fused, native))
        assert off <= 1.5 * native_off + 2**-8, (name, off, native_off)
        total, allowed = total + off, allowed + native_off
    assert total <= 1.1 * allowed


def test_in_the_interpreter(folders, monkeypatch):
    """The Triton kernels inside the whole step."""
    expected = step(folders("qwen3"), "lora.dropout=0.3", "ib.latent_dim=12", fused=False, lengths=[9, 14, 5, 11])
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    for modes in (None, ["full"] * 3):
        found = step(folders("qwen3"), "lora.dropout=0.3", "ib.latent_dim=12", modes=modes, lengths=[9, 14, 5, 11])
        assert_equal(found, expected)


@pytest.mark.parametrize("packing", [False, True])
def test_thirty_steps_agree(folders, packing):
    from accelerate.state import AcceleratorState

    def curve(fused):
        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(
            folders("llama"), random_samples(LENGTHS * 4), "train.max_steps=30", f"data.packing={packing}",
            f"train.fused_kernels={fused}", "lora.dropout=0.1", "train.gradient_accumulation_steps=2",
            f"train.gradient_checkpointing={not fused}",
        )  # fmt: skip
        rows = []
        trainer.on_log = rows.append
        trainer.train()
        return rows

    fused, plain = curve(True), curve(False)
    assert len(fused) == 30
    for key in ("loss", "ce", "kl", "ce_z"):
        left, right = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for rows in (fused, plain))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=0)
    assert fused[-1]["loss"] < fused[0]["loss"] - 0.15


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_packed_sample_equals_the_sample_alone(folders, family):
    """Its share of the loss, and its gradient, whoever its neighbours are."""
    from accelerate.state import AcceleratorState

    data = random_samples([20, 11, 17])
    samples = list(enumerate(data.samples))

    def gradient(rows, counted):
        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(folders(family), data, "lora.dropout=0.3")
        randomise_lora(trainer.model)
        trainer.model.train()
        batch = collate(rows, epoch=2, pad_id=0, kl_tokens="response", packed=True, pad_to=64)
        keep = torch.zeros(64, dtype=torch.bool)
        keep[counted] = True
        chosen = keep[batch.label_rows]
        kl_mask = batch.kl_mask & keep
        object.__setattr__(batch, "label_rows", batch.label_rows[chosen])
        object.__setattr__(batch, "targets", batch.targets[chosen])
        object.__setattr__(batch, "kl_mask", kl_mask)
        object.__setattr__(batch, "num_label_tokens", int(chosen.sum()))
        object.__setattr__(batch, "num_kl_tokens", int(kl_mask.sum()))
        return trainer.backward([batch]).loss, gradients(trainer)

    loss, alone = gradient([[samples[1]]], slice(0, 11))
    for row, place in (([samples[0], samples[1], samples[2]], 20), ([samples[2], samples[1]], 17)):
        packed_loss, packed = gradient([row], slice(place, place + 11))
        torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
        for name, value in alone.items():
            assert (packed[name] - value).norm() <= 1e-5 * value.norm(), name


# --- what the fast path does not know -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "a bias in LoRA's B"),
        ({"lora_dropout": 0.1}, "Dropout in place of SampleDropout"),
    ],
)
def test_other_adapters_keep_pefts_forward(change, reason):
    """They train as PEFT trains them; one line says which modules and why."""
    torch.manual_seed(0)
    config = tiny_model_config("qwen2", std=0.08)
    plain = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    settings = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"], **change)
    model = get_peft_model(plain, settings)
    randomise_lora(model)
    ids = torch.randint(2, 90, (1, 9))
    expected = model.eval()(ids).logits.detach()
    fused = fuse(model, BatchContext(0))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert set(fused.left_alone.values()) == {reason}
    assert not fused.packs
    (notice,) = fused.notices()
    assert notice.startswith("layers.0.self_attn and 5 more: PEFT's own forward, without the fused kernels (")
    assert reason in notice
    assert "\n" not in notice


def test_another_architecture_keeps_its_forward():
    config = tiny_model_config("llama")
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    fused = fuse(model, BatchContext(0))
    assert fused.notices() == [
        "layers.0.mlp and 2 more: PEFT's own forward, without the fused kernels (the activation GELU)"
    ]
    assert fused.packs


def test_attention_dropout_leaves_packing_to_transformers(folders, tmp_path, monkeypatch):
    """In training it needs transformers' mask: samples must not see each other there either."""
    import json
    import shutil

    shutil.copytree(folders("llama"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 1e-9}))
    dropping, plain = (step(str(folder), "data.packing=true") for folder in (tmp_path / "model", folders("llama")))
    assert not dropping[2].fused.packs
    assert_equal(dropping, plain)


def test_a_disabled_and_a_second_adapter(folders):
    """Disabling leaves the base; another active adapter runs PEFT's own forward."""
    trainer = tiny_trainer(folders("llama"), random_samples([9]))
    model = trainer.model.eval()
    randomise_lora(model)
    ids = torch.tensor([[4, 5, 6, 7]])
    tuned = model(ids).logits.detach()
    with model.disable_adapter():
        base = model(ids).logits.detach()
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(model(ids).logits, tuned, rtol=0, atol=0)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-4, atol=1e-5)  # its B is zero
    model.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, tuned, rtol=0, atol=0)


def test_what_peft_changes_later_counts(folders):
    """Another scaling, a new adapter of the same name, a copy of the model: as without the fast path."""
    import copy

    trainer = tiny_trainer(folders("llama"), random_samples([9]))
    model = trainer.model.eval()
    randomise_lora(model)
    ids = torch.tensor([[4, 5, 6, 7]])
    tuned = model(ids).logits.detach()
    with model.disable_adapter():
        base = model(ids).logits.detach()
    twin = copy.deepcopy(model)
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-4, atol=1e-5)
    for layer in layers:
        layer.set_scale("default", 1.0)
    torch.testing.assert_close(model(ids).logits, tuned, rtol=0, atol=0)

    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(twin(ids).logits, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids).logits, tuned, rtol=0, atol=0)

    settings = model.peft_config["default"]
    model.add_adapter("spare", settings)
    model.delete_adapter("default")
    model.add_adapter("default", settings)
    model.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-4, atol=1e-5)  # its B is zero


def test_a_merged_adapter_counts_once(folders):
    trainer = tiny_trainer(folders("llama"), random_samples([9]), "model.quantization=none")
    model = trainer.model.eval()
    randomise_lora(model)
    ids = torch.tensor([[4, 5, 6, 7]])
    tuned = model(ids).logits.detach()
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_sliding_window_that_binds(folders, tmp_path, packing):
    """Mistral with a window of 6 in samples of up to 31."""
    import json
    import shutil

    shutil.copytree(folders("mistral"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 6}))
    found, expected = (step(str(tmp_path / "model"), f"data.packing={packing}", fused=f) for f in (True, False))
    assert_equal(found, expected, 2e-5)
    wide = step(folders("mistral"), f"data.packing={packing}")
    assert (wide[0].ce - found[0].ce).abs() > 1e-4  # the window does bind


@pytest.mark.parametrize("what", ["a base weight", "a norm"])
def test_what_trains_is_left_alone(what):
    model = AutoModelForCausalLM.from_config(tiny_model_config("llama")).requires_grad_(False)
    layer = model.model.layers[1]
    (layer.mlp.up_proj if what == "a base weight" else layer.input_layernorm).weight.requires_grad_(True)
    fused = fuse(model, BatchContext(0))
    name, reason = (
        ("mlp", "base weights that train") if what == "a base weight" else ("input_layernorm", "a norm that trains")
    )
    assert fused.left_alone == {f"layers.1.{name}": reason}
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_residual_stream_keeps_its_dtype_under_autocast(folders):
    """An fp32 base under bf16 autocast: as near the fp32 truth as transformers' own modules, the tap included."""

    def gradient(precision, fused):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(folders("llama"), random_samples(LENGTHS), f"train.fused_kernels={fused}")
        randomise_lora(trainer.model)
        trainer.model.train()
        trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        trainer.backward(next(trainer.batches(trainer.data, epoch=0)))
        return gradients(trainer)

    truth, fused, native = gradient("fp32", False), gradient("bf16", True), gradient("bf16", False)

    def off(run):
        return sum(float((run[name] - value).norm() / value.norm()) for name, value in truth.items())

    assert 0 < off(fused) <= 1.1 * off(native)


def test_generation_equals_the_unfused(folders):
    """Greedy, left-padded, with a cache."""
    from accelerate.state import AcceleratorState

    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    texts = []
    for fused in (True, False):
        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(folders("qwen3"), random_samples([9]), f"train.fused_kernels={fused}")
        randomise_lora(trainer.model)
        texts.append(
            trainer.model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        )
    assert torch.equal(texts[0], texts[1])


def test_masters_are_rounded_once_a_step_and_before_each_evaluation(folders, monkeypatch):
    from ibft import fused as module

    refreshed = []
    refresh = module.refresh_shadows
    monkeypatch.setattr(module, "refresh_shadows", lambda found: refresh(refreshed.append([*found]) or refreshed[-1]))
    trainer = tiny_trainer(
        folders("llama"), random_samples(LENGTHS), "data.packing=false", "train.mixed_precision=bf16",
        eval_data=random_samples([9, 20]),
    )  # fmt: skip
    (step_batches, *_) = trainer.batches(trainer.data, epoch=0)
    assert len(step_batches) == 4
    trainer.train_step(step_batches)
    assert [len(found) for found in refreshed] == [0]  # made in the first forward, fresh
    trainer.train_step(step_batches)
    assert [len(found) for found in refreshed] == [0, 12]  # the inputs of three layers, once for four micro-batches
    trainer.evaluate()
    assert [len(found) for found in refreshed] == [0, 12, 12]
    q = trainer.fused.shared[0]
    with torch.no_grad():
        q.projections[0].lora_a.mul_(3)
    trainer.evaluate()
    assert torch.equal(q.shadow.a_RD[:4], q.projections[0].lora_a.bfloat16())


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "wide"), [("none", 2), ("mlp", 0)])
@pytest.mark.parametrize("interpreted", [True, False])
def test_saved_bytes_of_a_layer(folders, monkeypatch, mode, wide, interpreted):
    """A block's LoRA layers save their inputs (X of qkv, o, MLP), gate, up and the low-rank products, and no more.
    Norms save their input and a number a row; attention q, k, v, its output and a number a row and head; rotation
    nothing. The torch path adds a byte an element for dropout's masks, which the Triton path recomputes.
    """
    monkeypatch.setattr(_dispatch, "INTERPRETED", interpreted)
    dropout = 0.3
    trainer = tiny_trainer(folders("llama"), random_samples([60]), f"lora.dropout={dropout}", "lora.r=4")
    set_recompute(trainer.model, trainer.fused, [mode] * 3)
    trainer.model.train()
    ((batch,),) = trainer.batches(trainer.data, epoch=0)
    block = trainer.model.get_base_model().model.layers[0]  # not the tapped one
    saved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    outside = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in outside:
            saved[x.data_ptr(), x.shape] = x
        return x

    hidden = torch.randn(1, 60, 64, requires_grad=True)
    tables = trainer.model.get_base_model().model.rotary_emb(hidden, batch.position_ids)
    outside |= {table.untyped_storage().data_ptr() for table in tables}
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with trainer.context.batch(batch.noise_ids, batch.segments), saving:
        out = block(hidden, position_embeddings=tables)
    N, D, W, R, heads, kv = 60, 64, 128, 4, 4, 32
    lora = 4 * (3 * D + wide * W + (3 + 1 + 2 + 1) * R)  # X of qkv, o and the MLP; gate, up; x A^T
    masks = 0 if interpreted else 3 * D + W  # of each input
    norms = 4 * (2 * D + 2)
    attention = 4 * (D + 2 * kv + D + heads)  # q, k, v, output, logsumexp; the output is also o's X
    found = sum(x.untyped_storage().nbytes() if x._is_view() else x.nbytes for x in unique(saved.values()))
    assert found <= N * (lora + masks + norms + attention)
    assert found >= N * (lora - 4 * D)  # the count counts
    out.sum().backward()


def unique(tensors):
    return {x.untyped_storage().data_ptr(): x for x in tensors}.values()


# --- the tap's buffer -----------------------------------------------------------------------------


def tapped_node(seed=0):
    """(output function, leaves) of `ib_lora_mlp` in float64, its residual shared with another branch."""
    torch.manual_seed(seed)

    def leaf(*shape):
        return (0.3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    D, W, R, Z, N = 12, 20, 3, 5, 7

    def projection(o, i):
        return LoraProjection(torch.randn(o, i, dtype=torch.float64) * i**-0.5, None, leaf(R, i), leaf(o, R))

    gate, up, down = projection(W, D), projection(W, D), projection(D, W)
    x, weight = leaf(N, D), leaf(2 * Z, D)
    masters = [m for p in (gate, up, down) for m in (p.lora_a, p.lora_b)]

    def run(ops, shared):
        """`shared`: h + x goes on, so autograd hands one gradient to the node and to x's other branch."""
        residual = torch.tanh(x)
        hidden, (z, kl, *_) = ops.ib_lora_mlp(x, residual, gate, up, down, weight, None, eps=torch.ones(N, Z).double())
        out = hidden + residual if shared else hidden * 1.5
        return (out @ torch.ones(D, D).double()).sin().sum() + z.square().sum() + kl

    return run, [x, weight, *masters]


@pytest.mark.parametrize("guard", [True, False])
def test_a_shared_residual_gradient_is_not_written_to(monkeypatch, guard):
    """With the guard the gradients are right; without it the residual's is corrupted, so the test can fail."""
    import ibft_kernels
    from ibft_kernels import reference

    if not guard:
        monkeypatch.setattr(tap_module, "owns", lambda _: True)
    run, leaves = tapped_node()
    found = torch.autograd.grad(run(ibft_kernels, True), leaves)
    expected = torch.autograd.grad(run(reference, True), leaves)
    same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert same == guard


@pytest.fixture
def inplace(monkeypatch):
    """What each backward of the tap asked of `ib_lora_backward`. A spy on `owns` itself would hold a reference."""
    asked = []
    backward = tap_module.ib_lora_backward
    monkeypatch.setattr(tap_module, "ib_lora_backward", lambda *a, **k: asked.append(k["inplace"]) or backward(*a, **k))
    return asked


def test_the_buffer_is_used_where_it_is_owned_and_only_there(inplace):
    import ibft_kernels

    run, leaves = tapped_node()
    torch.autograd.grad(run(ibft_kernels, True), leaves)
    assert inplace == [False]
    torch.autograd.grad(run(ibft_kernels, False), leaves)
    assert inplace == [False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("modes", [None, ["mlp"] * 3, ["full"] * 3])
def test_the_trainer_writes_into_the_arriving_gradient(folders, inplace, modes, precision):
    step(folders("llama"), f"train.mixed_precision={precision}", "data.packing=true", modes=modes)
    assert inplace
    assert all(inplace)


def test_the_tap_has_no_second_derivative():
    import ibft_kernels

    run, leaves = tapped_node()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(run(ibft_kernels, False), leaves, create_graph=True)
