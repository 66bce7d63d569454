"""What a trainer has to remember, as tensors and JSON, so that a resumed run is the run that was never stopped.

Every random draw and the order of the data are functions of seed, epoch and place (`ibft.noise`, `ibft.data.order`), so
that no generator's state belongs to it. Names of the tensors:

    weights/<group>/<index>    the fp32 masters, as `Trainer.groups` lists them: LoRA and bottleneck
    fixed/<name>               what of the bottleneck is not trained (ib.encoder=random_projection)
    <group>/<index>/<key>      the optimizer's state of that weight
    qmap/<name>                code books of an 8-bit optimizer, which its weights share
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ibft import processes
from ibft.config import BUNDLED, Config
from ibft.errors import ConfigError
from ibft.hashes import hash_file

if TYPE_CHECKING:
    from ibft.loop import Trainer

Facts = dict[str, Any]  # JSON
# settings that change nothing of what is trained, and paths of data, which their content's hash stands for
FREE = (
    "preset", "model.offload_embeddings", "data.path", "data.eval_path", "data.eval_split", "data.keep_ids",
    "data.drop_ids", "data.decontaminate", "data.cache", "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.activation_offloading",
    "train.logging_steps", "train.eval_steps", "train.per_device_eval_batch_size", "train.report_to", "eval.",
    "checkpoint.", "runtime.memory_budget",
)  # fmt: skip
_QMAPS = ("qmap1", "qmap2")  # of a weight: the optimizer's, under qmap/

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Schedule(_Part):
    """Of torch's LambdaLR; rates: one a parameter group."""

    last_epoch: Count
    step_count: Count
    base_lrs: list[Finite]
    last_lrs: list[Finite]


class _State(_Part):
    """index: steps already taken of this epoch. evaluated: step of the last evaluation. best: None before the first.

    skipped: steps that were not finite and left out. tokens, seconds: of training, in all. parameters: group -> names.
    optimizer: "<group>/<index>" -> what of that weight's state is no tensor. scaler: of an fp16 run.
    """

    seed: Count
    epoch: Count
    index: Count
    step: Count
    evaluated: Count
    best: Finite | None
    skipped: Count
    tokens: Count
    seconds: Annotated[Finite, Field(ge=0)]
    schedule: _Schedule
    scaler: dict[str, Finite | int] | None
    parameters: dict[str, list[str]]
    optimizer: dict[str, dict[str, Finite | int]]


def collect(trainer: "Trainer") -> tuple[dict[str, Tensor], Facts]:
    """The trainer's state between two steps: tensors on the host, and JSON.

    On a CPU the tensors are the trainer's own: they are to be written before its next step.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(trainer).items()}
    scheduler, scaler, window = trainer.scheduler, trainer.accelerator.scaler, trainer.window
    state = _State(
        seed=trainer.config.runtime.seed,
        epoch=trainer.epoch,
        index=trainer.index,
        step=trainer.step,
        evaluated=trainer.evaluated,
        best=trainer.best if math.isfinite(trainer.best) else None,
        skipped=trainer.skipped,
        tokens=window.total_tokens + window.tokens,
        seconds=window.total_seconds + window.now() - window.start,
        schedule=_Schedule(
            last_epoch=scheduler.last_epoch,
            step_count=scheduler._step_count,
            base_lrs=scheduler.base_lrs,
            last_lrs=scheduler._last_lr,
        ),
        scaler=None if scaler is None else scaler.state_dict(),
        parameters=_parameter_names(trainer),
        optimizer={
            name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for name, state in _optimizer_state(trainer).items()
        },
    )
    return tensors, state.model_dump()


def restore(trainer: "Trainer", tensors: dict[str, Tensor], facts: Facts) -> None:
    """Make a freshly built trainer the one that `collect` saw; facts may hold more.

    Raises:
        ConfigError: the state is not of such a trainer. No weight has been changed then.
    """
    state = _parse(facts)
    _check(trainer, state)
    _make_optimizer_state(trainer, state)
    own = _tensors(trainer)
    for name in own | tensors:
        expected, got = _kind(own.get(name)), _kind(tensors.get(name))
        if expected != got:
            raise _misfit(name, got, expected)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    _restore_schedule(trainer, state.schedule)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(dict(state.scaler or {}))
    trainer.step, trainer.epoch, trainer.index = state.step, state.epoch, state.index
    trainer.evaluated, trainer.skipped = state.evaluated, state.skipped
    trainer.best = math.inf if state.best is None else state.best
    window = trainer.window
    window.total_tokens, window.total_seconds = state.tokens, state.seconds
    window.tokens, window.start = 0, window.now()


def fingerprint(config: Config, data_sha256: str, tokenizer_key: str, base: str) -> Facts:
    """What decides a run's training, flat, by dotted key; two runs with equal ones are one run.

    How a step's rows are split, into micro-batches or over processes, changes nothing but rounding.

    Args:
        data_sha256: of the training rows (`Datasets.sha256`).
        tokenizer_key: `ibft.data.cache.tokenizer_key`.
        base: whatever tells the base's weights from others: a hub commit, a hash of its files.
    """
    flat = _flat(config.model_dump(mode="json"))
    facts = {key: value for key, value in flat.items() if not _is_free(key)}
    rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    facts["train.rows_per_step"] = rows * processes.count()
    # held-out rows of a file, and those of the bundled data, are none of the training rows
    if config.data.eval_path is not None or config.data.path == BUNDLED:
        facts["data.val_size"] = "not used"
    if Path(config.data.template).suffix:
        facts["data.template"] = hash_file(config.data.template) or config.data.template
    return {"data.sha256": data_sha256, "tokenizer": tokenizer_key, "base": base, **facts}


def changes(old: Facts, new: Facts) -> list[str]:
    """A line on each fact that differs, as "ib.alpha: was 0.1, is 0.2"; empty: the run is the same."""
    return [
        f"{key}: was {_shown(old, key)}, is {_shown(new, key)}"
        for key in [*new, *(key for key in old if key not in new)]
        if key not in old or key not in new or old[key] != new[key]
    ]


def _tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """Every tensor of the state by its name; the trainer's own, not copies."""
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()  # the host reads and writes paged state itself
    named: dict[str, Tensor] = {}
    for group, parameters in trainer.groups.items():
        named |= {f"weights/{group}/{index}": weight.detach() for index, weight in enumerate(parameters)}
    if trainer.objective.bottleneck is not None:
        trained = {name for name, weight in trainer.objective.bottleneck.named_parameters() if weight.requires_grad}
        whole = trainer.objective.bottleneck.state_dict()
        named |= {f"fixed/{name}": tensor for name, tensor in whole.items() if name not in trained}
    for name, state in _optimizer_state(trainer).items():
        named |= {
            f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor) and key not in _QMAPS
        }
    return named | {f"qmap/{name}": book for name, book in getattr(_inner(trainer), "name2qmap", {}).items()}


def _optimizer_state(trainer: "Trainer") -> dict[str, dict[str, Any]]:
    """By "<group>/<index>" the optimizer's state of that weight; a weight that had no gradient yet has none."""
    found = _inner(trainer).state
    return {
        f"{group}/{index}": found[weight]
        for group, parameters in trainer.groups.items()
        for index, weight in enumerate(parameters)
        if weight in found
    }


def _make_optimizer_state(trainer: "Trainer", state: _State) -> None:
    """Empty state, as the optimizer makes it in a weight's first step, of the weights that the saved one has it of."""
    optimizer = _inner(trainer)
    optimizer.state.clear()
    for number, (group, parameters) in enumerate(trainer.groups.items()):
        for index, weight in enumerate(parameters):
            scalars = state.optimizer.get(f"{group}/{index}")
            if scalars is None:
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                step = torch.zeros((), dtype=torch.float32, device=weight.device)
                moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": step, **moments}
            else:
                optimizer.init_state(optimizer.param_groups[number], weight, number, index)
            made = optimizer.state[weight]
            expected = sorted(key for key, value in made.items() if not isinstance(value, Tensor))
            if sorted(scalars) != expected:
                raise _misfit(f"{group}/{index}", ", ".join(sorted(scalars)), ", ".join(expected))
            made.update(scalars)


def _restore_schedule(trainer: "Trainer", schedule: _Schedule) -> None:
    trainer.scheduler.load_state_dict({
        "last_epoch": schedule.last_epoch, "_step_count": schedule.step_count, "base_lrs": schedule.base_lrs,
        "_last_lr": schedule.last_lrs, "lr_lambdas": [None] * len(schedule.base_lrs),
    })  # fmt: skip
    for group, rate in zip(_inner(trainer).param_groups, schedule.last_lrs, strict=True):
        group["lr"] = rate


def _parse(facts: Facts) -> _State:
    try:
        return _State.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the checkpoint's state: {where}: {first['msg']}") from None


def _check(trainer: "Trainer", state: _State) -> None:
    """Raises ConfigError: what is no tensor does not fit."""
    from ibft.loop import count_steps  # which may well import this module

    if state.seed != trainer.config.runtime.seed:
        raise _misfit("runtime.seed", state.seed, trainer.config.runtime.seed)
    steps = count_steps(trainer.data, trainer.config, trainer.accelerator.num_processes)
    if state.index > steps or state.epoch * steps + state.index != state.step:
        got = f"after step {state.step} epoch {state.epoch} and {state.index} steps of it"
        raise _misfit("data", got, f"{steps} steps an epoch")
    names = _parameter_names(trainer)
    if list(state.parameters) != list(names):
        raise _misfit("trained", ", ".join(state.parameters), ", ".join(names))
    for group, expected_names in names.items():
        found = state.parameters[group]
        if found != expected_names:
            pairs = zip([*found, "no more"], [*expected_names, "no more"], strict=False)
            raise _misfit(f"weights of {group}", *next((one, two) for one, two in pairs if one != two))
    for rates in (state.schedule.base_lrs, state.schedule.last_lrs):
        if len(rates) != len(names):
            raise _misfit("learning rates", len(rates), len(names))
    scaler = trainer.accelerator.scaler
    got_keys, expected_keys = (sorted(found or {}) for found in (state.scaler, scaler and scaler.state_dict()))
    if got_keys != expected_keys:
        raise _misfit("loss scale of fp16", ", ".join(got_keys) or "none", ", ".join(expected_keys) or "none")


def _misfit(what: str, got: object, expected: object) -> ConfigError:
    return ConfigError(f"the checkpoint's state is not of such a run: {what}: got {got}, expected {expected}")


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _inner(trainer: "Trainer") -> Any:
    """The optimizer inside accelerate's wrapper."""
    return trainer.optimizer.optimizer


def _parameter_names(trainer: "Trainer") -> dict[str, list[str]]:
    """Group -> names of its weights, in order: equal shapes alone would let q_proj pass for o_proj."""
    named = [*trainer.model.named_parameters()]
    if trainer.objective.bottleneck is not None:
        named += trainer.objective.bottleneck.named_parameters()
    names = {id(weight): name for name, weight in named}
    return {group: [names[id(weight)] for weight in parameters] for group, parameters in trainer.groups.items()}


def _flat(tree: Facts, prefix: str = "") -> Facts:
    flat: Facts = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _shown(facts: Facts, key: str) -> str:
    if key not in facts:
        return "absent"
    value = facts[key]
    return value if isinstance(value, str) else json.dumps(value)
