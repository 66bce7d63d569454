"""A 4-bit base of bitsandbytes' own: its layers run the fused forwards."""

import pytest
import torch
from hf_trainers import NAMES, assert_close, hf_trainer, losses
from transformers import AutoModelForCausalLM

from ibft.context import BatchContext
from ibft.fused import fuse


def bnb_model(folder, dropout=0.0, **quantised):
    """As a QLoRA user makes it: bitsandbytes' layers, PEFT over them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | quantised
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see ibft.nf4: its repacking would spoil the comparison
    torch.manual_seed(5)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    adapter = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, adapter)


def test_bitsandbytes_own_layers_are_fused(folder, tmp_path):
    """The same losses as by PEFT's and bitsandbytes' forwards; the modules stay theirs."""
    from peft.tuners.lora.bnb import Linear4bit

    both = []
    for fused in (True, False):
        trainer = hf_trainer(folder, tmp_path, model=bnb_model(folder), fused_kernels=fused)
        assert sum(isinstance(module, Linear4bit) for module in trainer.model.modules()) == 21
        if fused:
            assert trainer.fused.left_alone == {}
            assert trainer.fused.taps_fused
        trainer.train()
        both.append(losses(trainer, (*NAMES, "grad_norm")))
    assert len(both[0]) == 4
    assert_close(*both)


def test_its_bytes_may_change(folder):
    """Merging quantises anew: another parameter. The adapter is forgotten and the bytes are not."""
    from tiny_models import randomise_lora

    model = bnb_model(folder).eval()
    randomise_lora(model)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        fuse(model, BatchContext(0))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
        model.merge_adapter()
        merged = model(ids).logits
        plain = bnb_model(folder).eval()
        randomise_lora(plain)
        plain.merge_adapter()
        torch.testing.assert_close(merged, plain(ids).logits, rtol=1e-5, atol=1e-6)
        assert (merged - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({"bnb_4bit_use_double_quant": False}, "nf4 without double quantisation, expected nf4"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4 with double quantisation, expected nf4"),
        ({"bnb_4bit_quant_storage": torch.float32}, "stored as torch.float32, expected bnb_4bit_quant_storage"),
    ],
)
def test_four_bits_of_another_kind_keep_their_forward(folder, tmp_path, caplog, quantised, said):
    trainer = hf_trainer(folder, tmp_path, model=bnb_model(folder, **quantised), max_steps=1)
    assert len(trainer.fused.left_alone) == 6
    (notice,) = trainer.fused.notices()
    assert said in notice
    assert notice in caplog.text
    trainer.train()
    assert len(losses(trainer)) == 1
