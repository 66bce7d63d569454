"""The objective as the authors' released code computes it: two whole heads, every position, eager PyTorch.

    logits   = lm_head(h_last)                              [N, V]
    mu, lv   = h_20 W_mu^T + b_mu, clamp(h_20 W_lv^T + b_lv, -4, 4)
    logits_z = lm_head(up(mu + exp(lv / 2) eps))            [N, V]
    L        = CE + alpha (KL + beta CE_z)                  CE in fp32, labels of -100 ignored

The copies that its label shift makes of both logits are left out here, which only flatters it.
"""

import torch
import torch.nn.functional as F


def objective(last, tapped, labels, eps, head_weight, encoder_weight, encoder_bias, up_weight, up_bias, alpha, beta):
    """(loss, ce, kl, ce_z); last, tapped [N, D], labels [N], eps [N, Z], encoder_weight [2Z, D]."""
    ce = F.cross_entropy(F.linear(last, head_weight).float(), labels)
    w_mu, w_lv = encoder_weight.chunk(2)
    b_mu, b_lv = encoder_bias.chunk(2)
    mu = F.linear(tapped, w_mu, b_mu)
    logvar = torch.clamp(F.linear(tapped, w_lv, b_lv), -4, 4)
    z = mu + torch.exp(0.5 * logvar) * eps
    kl = -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())
    ce_z = F.cross_entropy(F.linear(F.linear(z, up_weight, up_bias), head_weight).float(), labels)
    return ce + alpha * (kl + beta * ce_z), ce, kl, ce_z
