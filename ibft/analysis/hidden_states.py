"""One vector a sample and layer: hidden states pooled over the response, the others never kept.

    hidden_states[0] = the embeddings, as block 1 takes them; hidden_states[l] = the output of decoder block l, 1 .. L

These are the states as the blocks hand them on, which is also what the bottleneck taps. transformers'
`output_hidden_states` differs in its last entry: there the final norm has been applied to the output of block L.

Legend: N samples, K layers, B samples at once, T their length, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ibft.data.encode import Progress
from ibft.data.samples import Sample
from ibft.tap import decoder_of

Pool = Literal["mean", "last"]


def pooled_states(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    layers: Sequence[int],
    pool: Pool,
    batch_size: int,
    pad_id: int,
    progress: Progress | None = None,
) -> Tensor:
    """Hidden states of each sample at each layer, pooled over its response.

    The model reads prompt and response, as in training. Pooled are the positions of the response's own tokens (its EOS
    is one, where the sample has it): their mean, or the last of them. Padding is on the right, where causal attention
    does not look, and is left out of the pooling; so there is no mask, and a sample's vector depends on the others of
    its batch by rounding alone, in the model's own precision.

    Args:
        model: a causal LM of the Llama family, PEFT-wrapped or not. Left in evaluation mode.
        layers: K numbers in 0 .. L, see above.
        batch_size: samples at once; those of like length go together.
        pad_id: any id of the vocabulary.
        progress: called with (samples done, samples in all) after each batch.

    Returns:
        [K, N, D] float64 on the CPU, in the order of `layers` and `samples`. Pooling is in float64 too.

    Raises:
        ValueError: a layer that the model has not, a sample without a response, a batch size below 1, another pool.
        ConfigError: not of the Llama family.
    """
    if pool not in ("mean", "last"):
        raise ValueError(f"pool: got {pool!r}, expected 'mean' or 'last'")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 or more")
    for i, sample in enumerate(samples):
        if len(sample.input_ids) <= sample.prompt_length:
            raise ValueError(f"samples: number {i} has no token of a response")
    decoder: Any = decoder_of(model)
    device = decoder.embed_tokens.weight.device
    pooled_KND = torch.full((len(layers), len(samples), decoder.config.hidden_size), torch.nan, dtype=torch.float64)
    # Longest first: memory runs out in the first batch or not at all.
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [samples[i] for i in chosen]
            ids = right_pad([sample.input_ids for sample in batch], pad_id)

            def keep(k: int, states_BTD: Tensor, batch: list[Sample] = batch, chosen: list[int] = chosen) -> None:
                pooled_KND[k, chosen] = pool_responses(states_BTD, batch, pool).cpu()

            with hooked(decoder, layers, keep):
                decoder(input_ids=ids.to(device), use_cache=False)
            if progress is not None:
                progress(start + len(chosen), len(order))
    return pooled_KND


def pool_responses(states_BTD: Tensor, samples: Sequence[Sample], pool: Pool) -> Tensor:
    """[B, D] float64. One sample after the other, so that no more than one is held in float64."""
    vectors = []
    for states_TD, sample in zip(states_BTD, samples, strict=True):
        end = len(sample.input_ids)
        first = sample.prompt_length if pool == "mean" else end - 1
        vectors.append(states_TD[first:end].double().mean(0))
    return torch.stack(vectors)


@contextmanager
def hooked(decoder: Any, layers: Sequence[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within, each forward calls keep(k, hidden_states[layers[k]]), [B, T, D]. Raises ValueError: no such layer."""
    blocks = decoder.layers
    for layer in layers:
        if not 0 <= layer <= len(blocks):
            raise ValueError(f"layers: got {layer}, expected 0 .. {len(blocks)}")
    handles = []
    try:
        for k, layer in enumerate(layers):
            if layer == 0:  # not the embedding's own output: some models scale that first

                def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], k: int = k) -> None:
                    keep(k, args[0] if args else kwargs["hidden_states"])

                handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(_: nn.Module, __: Any, output: Any, k: int = k) -> None:
                    keep(k, output[0] if isinstance(output, tuple) else output)

                handles.append(blocks[layer - 1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def right_pad(sequences: Sequence[list[int]], pad_id: int) -> Tensor:
    """[B, T] int64."""
    width = max(map(len, sequences))
    return torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in sequences])
