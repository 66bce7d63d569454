"""What a model thinks of each token of a text: its log-probability, and how that compares with the alternatives'.

    x_t     = head(h_t)                                     the logits [V] where token y_t is predicted
    log p_t = x_t[y_t] - logsumexp(x_t)
    mu_t    = sum_v p_v log p_v                             p = softmax(x_t): the mean is the model's own expectation,
    sigma_t = sqrt(sum_v p_v (log p_v - mu_t)^2)            not one over the vocabulary's entries
    z_t     = (log p_t - mu_t) / sigma_t                    (Zhang et al. 2024, arXiv 2404.02936)

The decoder runs on the padded batch; the head only where a token is scored, some rows at a time, so that no [N, V]
tensor exists. The logits have the model's precision, as when it generates; what is made of them is in fp32 (float64 of
a float64 model).

Legend: B texts, T their length, M scored tokens, m of them in a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ibft.data.samples import Sample
from ibft.tap import decoder_of

CHUNK_BYTES = 64 << 20  # of the logits of a chunk in fp32; about four tensors of that size live at once
# Below this fp32 cannot tell a distribution's spread from the rounding of its logits. It keeps z finite where the model
# is certain (or knows nothing at all); published code divides by what is there.
LEAST_SIGMA = 1e-6


@dataclass(frozen=True)
class TokenScores:
    """Of a text's scored tokens, in order. log_probs in nats; z_scores without unit."""

    log_probs: list[float]
    z_scores: list[float]


def score_batch(model: nn.Module, samples: Sequence[Sample], *, chunk_bytes: int = CHUNK_BYTES) -> list[TokenScores]:
    """The labels of each sample, seen from all that stands before them: `prompt_length` = 0 scores a whole text but its
    first token, which nothing predicts.

    Padding is on the right, where causal attention does not look; so there is no mask, and a text's scores depend on
    the others of the batch by rounding alone.

    Args:
        model: a causal LM of the Llama family, PEFT-wrapped or not. Left in evaluation mode.
        samples: at least one, each with a label.
        chunk_bytes: of logits at a time; one row at least.

    Raises:
        ValueError: no sample, or one without a label.
        ConfigError: not of the Llama family.
    """
    if not samples or any(sample.num_labels == 0 for sample in samples):
        raise ValueError("samples: expected at least one, each with a label")
    decoder: Any = decoder_of(model)
    device = decoder.embed_tokens.weight.device
    width = max(len(sample.input_ids) for sample in samples)
    ids_BT = torch.zeros(len(samples), width, dtype=torch.long)
    rows, targets = [], []
    for b, sample in enumerate(samples):
        labels = torch.from_numpy(sample.label_positions())
        ids_BT[b, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        rows.append(labels - 1 + b * width)
        targets.append(ids_BT[b, labels])
    rows_M, targets_M = torch.cat(rows).to(device), torch.cat(targets).to(device)

    model.eval()
    with torch.no_grad():
        hidden_BTD = decoder(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        log_p_M, z_M = _score_rows(head, hidden_BTD.flatten(0, 1)[rows_M], targets_M, decoder, chunk_bytes)
    counts = [sample.num_labels for sample in samples]
    parts = zip(log_p_M.cpu().split(counts), z_M.cpu().split(counts), strict=True)
    return [TokenScores(log_p.tolist(), z.tolist()) for log_p, z in parts]


def _score_rows(
    head: nn.Module, hidden_MD: Tensor, targets_M: Tensor, decoder: Any, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    chunk = max(1, chunk_bytes // (4 * decoder.config.vocab_size))
    pairs = zip(hidden_MD.split(chunk), targets_M.split(chunk), strict=True)
    log_ps, zs = zip(*(score_logits(head(hidden_mD), targets_m) for hidden_mD, targets_m in pairs), strict=True)
    return torch.cat(log_ps), torch.cat(zs)


def score_logits(logits_mV: Tensor, targets_m: Tensor) -> tuple[Tensor, Tensor]:
    """(log p [m], z [m]), in fp32 or, of float64 logits, in float64."""
    log_p_mV = logits_mV.to(torch.promote_types(logits_mV.dtype, torch.float32)).log_softmax(-1)
    p_mV = log_p_mV.exp()
    log_p_m = log_p_mV.gather(1, targets_m[:, None]).squeeze(1)
    mu_m = (p_mV * log_p_mV).sum(1)
    # the squares of the differences, not the difference of the squares, which cancels where the model is sure
    sigma_m = log_p_mV.sub_(mu_m[:, None]).square_().mul_(p_mV).sum(1).sqrt()
    return log_p_m, (log_p_m - mu_m) / sigma_m.clamp_min(LEAST_SIGMA)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices into `lengths`, each in one batch, those of like length together, the longest first.

    A batch holds at most `batch_tokens` tokens with its padding; a longer text has one of its own. Equal lengths come
    in the order given, so that the plan depends on nothing else.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
