"""How the op tests compare a result with its float64 truth."""

import torch


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest error in the measure of `check`: what rel it would pass with."""
    scaled = [
        ((found[name].double() - expected).abs() / (expected.abs() + expected.square().mean().sqrt())).nan_to_num()
        for name, expected in truth.items()
    ]
    return max(float(error.max()) for error in scaled if error.numel())


def check(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], rel: float) -> None:
    """Elementwise: |found - truth| <= rel (|truth| + the tensor's root mean square)."""
    for name, expected in truth.items():
        assert found[name].shape == expected.shape, name
        scale = expected.abs() + expected.square().mean().sqrt()
        worst = ((found[name].double() - expected).abs() - rel * scale).max() if expected.numel() else -1
        assert worst <= 0, f"{name}: beyond the {rel} allowed by {worst}"
