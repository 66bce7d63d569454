"""`ibft-fast train`: from a configuration to a trained adapter and a table that says what it was worth."""

import importlib.metadata
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ibft import checkpoint, processes
from ibft.config import BUNDLED, Config, IBConfig, TrainConfig
from ibft.console import Console, size
from ibft.errors import ConfigError, DataError, SetupError
from ibft.memory import free_memory, peak_memory_mib
from ibft.model_card import write_model_card
from ibft.out_of_memory import OutOfMemoryAdvice
from ibft.plan import CUDA_CONTEXT, GIB, Choice, Load, ModelShape, Setup, choose_plan
from ibft.resume import check_same_run, find_checkpoint, identity_of_base, open_run
from ibft.rundir import RunDir, write_adapter
from ibft.trainer_state import collect, fingerprint, restore
from ibft.watch import Watch, solves_fewer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP = "STOP"
FEW_STEPS = 10  # below which a note is due: warm-up and noise are most of such a run

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from ibft.bottleneck import InformationBottleneck
    from ibft.data.encode import EncodedData
    from ibft.data.prepare import Datasets
    from ibft.loop import Trainer


def run_training(
    config: Config,
    out: Path | None,
    *,
    dry_run: bool = False,
    resume: str = "never",
    force_resume: bool = False,
    notices: list[str] | None = None,
) -> int:
    """Train as configured; returns the exit code (0, or 128 + signal when interrupted and saved).

    Started by a launcher, this is one process of several: the first one alone talks and writes (`ibft.processes`).

    resume: never, auto or a path, see `ibft.resume`. force_resume: also where settings, data, tokenizer or base differ.

    Cheap refusals come first: device, model configuration, layer and data are checked before any weight is loaded.

    Raises:
        IBFTError: whatever the user can mend.
    """
    named = (config.data.path, config.data.eval_path, config.eval.tasks)
    if config.model.name_or_path == BUNDLED and all(is_local(path) for path in named):
        # the bundled base is on disk: no library need ask the network for anything. Never set for a user's own model.
        os.environ["HF_HUB_OFFLINE"] = "1"
    first = processes.rank() == 0
    console = Console(quiet=not first)
    for notice in notices or []:
        console.notice(notice)
    with OutOfMemoryAdvice() as advice, deterministic_algorithms(config.runtime.deterministic):
        run_dir, resume = open_run(out, resume) if first else (RunDir(out, resumes=True), "never")
        if first and run_dir.holds_run and not dry_run:
            run_dir.lock()  # before its checkpoints are looked at, and long before any weight is loaded
        check_trackers(config)
        device = choose_device(config)
        dtype = choose_dtype(config.train, device)

        from ibft.data.cache import tokenizer_key
        from ibft.data.prepare import load_data
        from ibft.data.templates import template_in_use
        from ibft.loop import count_all_steps, count_steps
        from ibft.model import load_model_config, load_tokenizer, resolve_layers

        base_config = load_model_config(config.model)
        layer = resolve_layers(config.ib.layer, base_config.num_hidden_layers) if config.ib.alpha > 0 else None
        tokenizer = load_tokenizer(config.model)
        data = load_data(config, tokenizer, console)
        run = fingerprint(config, data.sha256, tokenizer_key(tokenizer), identity_of_base(config, base_config))
        found, warnings = find_checkpoint(run_dir, resume)
        state = None
        if found is not None:
            state = checkpoint.load(found)
            warnings += check_same_run(found, state[1].get("run"), run, force=force_resume)
        for warning in warnings:
            console.notice(warning)
        tasks = load_tasks(config)
        console.header(config, layer=layer, layers=base_config.num_hidden_layers, device=device, dtype=dtype)
        if config.data.max_length > base_config.max_position_embeddings:
            console.notice(f"data.max_length is beyond the model's {base_config.max_position_embeddings:,} positions")
        setup = setup_of(config, base_config, data, device, dtype)
        choice = choose_plan(setup, memory_budget(config, device))
        advice.setup, advice.choice = setup, choice
        console.memory(config, choice)
        epoch = count_steps(data.train, config, processes.count())
        console.line(describe_steps(config, data.train, epoch))
        if (steps := count_all_steps(config, epoch)) < FEW_STEPS:
            console.notice(
                f"only {steps} optimizer steps, too few to learn from: raise train.num_train_epochs or max_steps, "
                "or lower train.gradient_accumulation_steps"
            )
        if dry_run:
            console.notice("dry run: configuration, model files and data are in order; nothing was trained or written")
            return 0

        accelerator = make_accelerator(config, device, dtype, run_dir)
        if accelerator.num_processes > 1:
            run_dir.path, found = processes.of_first([run_dir.path, found])
            if not first and found is not None:
                state = checkpoint.load(found)
        trainer, notes = build_trainer(config, tokenizer, data, layer, accelerator, dtype, choice)
        advice.trainer = trainer
        for notice in notes:
            console.notice(notice)
        start_trackers(config, accelerator)
        if first:
            run_dir.create()
        progress = Progress(run)
        try:
            if state is not None:
                restore(trainer, *state)
                progress.go_on(state[1])
                console.line(f"resumed from {found}, after step {trainer.step} of {trainer.total_steps}")
            if first:
                run_dir.write_config(config)
                run_dir.write_manifest(
                    device=device_name(device),
                    processes=accelerator.num_processes,
                    dtype=str(dtype).removeprefix("torch."),
                    seed=config.runtime.seed,
                    base_model=config.model.name_or_path,
                    data_sha256=data.sha256,
                    template=template_in_use(config.data.template, data.train.formats),
                    ib_layer=layer,
                    memory=choice.facts(),
                )
            return train_and_report(config, trainer, tokenizer, tasks, run_dir, console, progress)
        except BrokenPipeError:  # whoever read our output has left: not the run folder's fault
            raise
        except OSError as error:  # a full disk, a vanished folder
            raise SetupError(f"run folder {run_dir.path}: {error.strerror or error}") from error
        finally:
            accelerator.end_training()


def train_and_report(
    config: Config,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[dict[str, Any]],
    run_dir: RunDir,
    console: Console,
    progress: "Progress",
) -> int:
    """Pass@1, training, Pass@1 again; then the table."""
    first = trainer.accelerator.is_main_process
    rows: list[dict[str, Any]] = run_dir.rewind(trainer.step, trainer.evaluated) if first else []
    warnings: list[str] = []
    watch = Watch(config, trainer.total_steps)
    for row in rows:  # of before a stop
        warnings += [f"step {row['step']}: {warning}" for warning in watch.see(row)]

    def log(row: dict[str, Any]) -> None:
        rows.append(row)
        run_dir.log(row)
        progress.track(trainer.accelerator, row, console)
        console.metrics(row)
        for warning in watch.see(row):
            warnings.append(f"step {row['step']}: {warning}")
            console.notice(f"warning: {warnings[-1]}")

    def save(name: str) -> None:
        bottleneck = trainer.objective.bottleneck
        if not name.startswith("checkpoints/"):
            folder = run_dir.save_adapter(name, trainer.model, bottleneck, tokenizer)
            write_model_card(folder, config, manifest=run_dir.manifest)
            return
        started = time.perf_counter()
        tensors, facts = collect(trainer)
        folder = checkpoint.save(
            run_dir.checkpoints, trainer.step, lambda fresh: write_adapter(fresh, trainer.model, bottleneck, tokenizer),
            tensors, facts | progress.facts(),
        )  # fmt: skip
        checkpoint.keep(run_dir.checkpoints, last=config.checkpoint.keep_last)
        taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        console.line(f"saved {folder}: {size(taken)} in {time.perf_counter() - started:.1f} s")

    faults: list[dict[str, Any]] = []

    def fault(facts: dict[str, Any]) -> None:
        faults.append(facts)
        run_dir.write_json("non_finite.json", {"faults": faults})
        if facts["skipped"]:
            console.notice(f"{facts['error']}: the step is left out (train.skip_non_finite)")

    if first:
        stop = run_dir.path / STOP
        if stop.exists():
            console.notice(f"{stop} is of an earlier run: removed")
            stop.unlink()
        trainer.on_log, trainer.on_save, trainer.on_fault, trainer.on_notice = log, save, fault, console.notice
        trainer.on_latent = run_dir.log_latent
        trainer.should_stop = stop.exists
    handlers = {number: signal.signal(number, trainer.interrupt) for number in SIGNALS}
    try:
        if not progress.began:
            progress.before = pass_at_1(config, trainer, tokenizer, tasks, console, "before")
            progress.began = True
        before = progress.before
        started = time.perf_counter()
        with console.progress("training", trainer.total_steps, elsewhere=False) as advance:
            trainer.on_step = lambda step, _row: advance(step)
            trainer.train()
        trainer.heed()  # a signal during the last save
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    seconds = time.perf_counter() - started
    if trainer.interrupted:
        console.notice(
            f"interrupted by {trainer.interrupted.name} after step {trainer.step}; saved to {run_dir.path}/adapter; "
            f"go on with --resume auto -o {run_dir.path}"
        )
        return 128 + trainer.interrupted
    after = pass_at_1(config, trainer, tokenizer, tasks, console, "after")
    if not first:
        return 0
    if config.ib.alpha > 0 and "compressed" not in watch.said and (fewer := solves_fewer(before, after)):
        warnings.append(fewer)
        console.notice(f"warning: {fewer}")

    steps = [row for row in rows if "loss" in row]
    if not steps:  # gone on with elsewhere from a run's last checkpoint, or none of its steps was finite
        console.notice(f"no step was trained here: {run_dir.path}/adapter is what step {trainer.step} left")
        return 0
    result = {
        "steps": trainer.step,
        "first": steps[0],
        "last": steps[-1],
        "eval_ce": [row["eval_ce"] for row in rows if "eval_ce" in row],
        "tokens_per_second": trainer.window.total_tokens / trainer.window.total_seconds,
        "training_seconds": seconds,
        "peak_memory_mib": peak_memory_mib(trainer.accelerator.device),
        "pass_at_1": {"before": before, "after": after},
        "warnings": warnings,
    }
    run_dir.write_json("result.json", result)
    for folder in run_dir.adapters:
        write_model_card(folder, config, result=result, manifest=run_dir.manifest)
    on_cpu = trainer.accelerator.device.type == "cpu"
    console.result(result, run_dir.path, kept_best=(run_dir.path / "adapter-best").exists(), on_cpu=on_cpu)
    return 0


def build_trainer(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    data: "Datasets",
    layer: int | tuple[int, ...] | None,
    accelerator: "Accelerator",
    dtype: torch.dtype,
    choice: Choice | None = None,
) -> tuple["Trainer", list[str]]:
    """Load the base, attach LoRA and bottleneck, make the optimizer; also notices for the user.

    layer: tapped, or several; None without a bottleneck. choice: of the memory plan; default: made here, for what was
    free before the base was loaded.
    """
    from ibft.context import BatchContext
    from ibft.fused import Fused, fuse
    from ibft.loop import Trainer, count_all_steps, count_steps
    from ibft.model import add_lora, load_base, lora_parameters, pad_id_of
    from ibft.objective import IBObjective
    from ibft.offload import offload_embeddings
    from ibft.optim import Groups, make_optimizer, make_scheduler
    from ibft.recompute import HostCopies, set_recompute
    from ibft.tap import HiddenTap

    context, device = BatchContext(config.runtime.seed), accelerator.device
    budget = memory_budget(config, device) if choice is None else None
    base = load_base(config.model, dtype=dtype, device=device)
    plan = (choice or choose_plan(setup_of(config, base.config, data, device, dtype), budget)).plan
    embeddings = offload_embeddings(base, device) if plan.offload_embeddings else None
    model = add_lora(base, config.lora, context=context)
    # the context holds one block's order: of several the hooks take the hidden states
    fuses = config.ib.encoder != "mlp" and config.ib.prior == "standard"
    fused = (
        fuse(model, context, tapped_layer=layer if fuses and isinstance(layer, int) else None)
        if config.train.fused_kernels
        else Fused(mlps=[None] * base.config.num_hidden_layers, packs=False)
    )
    set_recompute(model, fused, plan.modes, copies=HostCopies(device) if plan.activation_offloading else None)
    groups: Groups = {"lora": lora_parameters(model)}
    bottleneck, taps = None, []
    if layer is not None:
        torch.manual_seed(config.runtime.seed)
        layers = layer if isinstance(layer, tuple) else (layer,)
        made = {str(each): make_bottleneck(config.ib, base.config.hidden_size).to(device) for each in layers}
        bottleneck = torch.nn.ModuleDict(made) if len(layers) > 1 else made[str(layers[0])]
        groups["bottleneck"] = [weight for weight in bottleneck.parameters() if weight.requires_grad]
        taps = [HiddenTap(model, each) for each in layers]
    processes.share_weights(accelerator, [weight for weights in groups.values() for weight in weights])
    objective = IBObjective(bottleneck, alpha=config.ib.alpha, beta=config.ib.beta, kl_reduction=config.ib.kl_reduction)
    optimizer, notices = make_optimizer(
        groups, config.train, bottleneck_lr=config.ib.learning_rate, device=accelerator.device
    )
    total_steps = count_all_steps(config, count_steps(data.train, config, accelerator.num_processes))
    scheduler = make_scheduler(optimizer, config.train, total_steps)
    trainer = Trainer(
        config=config,
        model=model,
        objective=objective,
        taps=taps,
        context=context,
        fused=fused,
        embeddings=embeddings,
        groups=groups,
        optimizer=accelerator.prepare(optimizer),
        scheduler=scheduler,
        accelerator=accelerator,
        data=data.train,
        eval_data=data.held_out,
        pad_id=pad_id_of(tokenizer),
        total_steps=total_steps,
    )
    return trainer, [*fused.notices(), *notices]


def make_bottleneck(ib: IBConfig, hidden_size: int) -> "InformationBottleneck":
    """Of one layer. Raises ConfigError for a projection to more dimensions than there are."""
    from ibft.bottleneck import InformationBottleneck
    from ibft.priors import make_prior

    if ib.encoder == "random_projection" and ib.latent_dim > hidden_size:
        raise ConfigError(f"ib.latent_dim: got {ib.latent_dim}, expected at most {hidden_size} to project")
    prior = make_prior(ib.prior, ib.latent_dim, ib.prior_components)
    return InformationBottleneck(
        hidden_size, ib.latent_dim, ib.encoder, ib.mlp_dim, deterministic=ib.deterministic, prior=prior
    )


def memory_budget(config: Config, device: torch.device) -> int | None:
    """Bytes that tensors may take: `runtime.memory_budget`, or what is free now; None where that cannot be known."""
    if config.runtime.memory_budget is None:
        return free_memory(device)
    return int(config.runtime.memory_budget * GIB) - (CUDA_CONTEXT if device.type == "cuda" else 0)


def setup_of(config: Config, base_config: Any, data: "Datasets", device: torch.device, dtype: torch.dtype) -> Setup:
    """What the memory plan is made for. base_config: transformers' of the base."""
    return Setup.of(ModelShape.of(base_config), config, device.type, dtype.itemsize, Load.of(config, data.train))


def describe_steps(config: Config, data: "EncodedData", epoch: int) -> str:
    """How many there are, and what of them is padding. epoch: steps of one."""
    from ibft.data.order import pack
    from ibft.loop import count_all_steps

    length = config.data.max_length
    steps = f"{epoch:,} steps an epoch, {count_all_steps(config, epoch):,} in all"
    if not config.data.packing:
        return f"steps: a sample a row; {steps}"
    rows = len(pack(data.lengths, length))
    padding = 1 - data.num_tokens / (rows * length)
    return f"steps: packed into {rows:,} rows of {length:,} tokens, {padding:.1%} of them padding; {steps}"


def is_local(path: str | None) -> bool:
    try:
        return path is None or path == BUNDLED or Path(path).expanduser().exists()
    except OSError:  # a locked folder, a name too long: `load_rows` says so
        return True


def choose_device(config: Config) -> torch.device:
    """Of several processes on a machine each has a GPU of its own.

    Raises:
        SetupError: CUDA was asked for and there is none, or too few. ConfigError: a setting for one process alone.
    """
    available = torch.cuda.is_available()
    if config.runtime.device == "cuda" and not available:
        raise SetupError(
            "runtime.device=cuda, but torch finds no CUDA device (runtime.device=auto falls back to the CPU)"
        )
    on_cpu = not available or config.runtime.device == "cpu"
    if processes.count() == 1:
        return torch.device("cpu" if on_cpu else "cuda")
    if config.train.auto_micro_batch:  # one process alone would run out of memory, and the others wait for it
        raise ConfigError(f"train.auto_micro_batch: for one process, got {processes.count()}")
    if on_cpu:
        return torch.device("cpu")
    if (number := processes.local_rank()) >= torch.cuda.device_count():
        raise SetupError(f"{number + 1} or more processes on this machine, and {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", number)


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Compute dtype. Masters of LoRA and bottleneck are fp32 in any case."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if config.mixed_precision != "auto":
        if config.mixed_precision == "fp16" and device.type == "cpu":
            raise ConfigError("train.mixed_precision=fp16 needs a GPU: use bf16 or fp32 on a CPU")
        return named[config.mixed_precision]
    if device.type == "cpu":
        return torch.float32
    # emulated bf16 (before sm_80) is slower than fp16
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def make_accelerator(config: Config, device: torch.device, dtype: torch.dtype, run_dir: RunDir) -> "Accelerator":
    """Device placement, mixed precision and trackers. Its own accumulation stays at 1: the loop accumulates exactly."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype]
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=list(config.train.report_to) or None,
        project_dir=str(run_dir.path),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=processes.PATIENCE)],
    )


def check_trackers(config: Config) -> None:
    """Raises SetupError for a tracker that is not installed (accelerate would leave it out in silence)."""
    for name in config.train.report_to:
        try:
            importlib.metadata.version(name)  # an import would also find a folder of that name, as wandb leaves one
        except importlib.metadata.PackageNotFoundError:
            raise SetupError(f"train.report_to={name}: not installed; run `pip install {name}`") from None


def start_trackers(config: Config, accelerator: "Accelerator") -> None:
    if config.train.report_to:
        sections = {name: value for name, value in config.model_dump().items() if isinstance(value, dict)}
        flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flat.items()}
        try:
            accelerator.init_trackers("ibft-fast", config=plain)
        except Exception as error:  # whatever a tracker's own library raises: not logged in, no network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SetupError(f"train.report_to={','.join(config.train.report_to)}: {reason}") from error


def load_tasks(config: Config) -> list[dict[str, Any]]:
    """Programming tasks for Pass@1: the bundled test split when training on the bundled tasks, else `eval.tasks`."""
    from ibft.data.sources import load_rows
    from ibft.tiny import task_file

    path = config.eval.tasks
    if path is None and config.data.path != BUNDLED:
        return []
    tasks = load_rows(str(task_file("test")) if path in (None, BUNDLED) else path)
    for number, task in enumerate(tasks, 1):
        missing = [
            key for key in ("task_id", "instruction", "entry_point", "test") if not isinstance(task.get(key), str)
        ]
        if missing:
            raise DataError(f"eval.tasks: {path}, row {number}: expected text under {', '.join(missing)}")
    return tasks[: config.eval.max_tasks]


def pass_at_1(
    config: Config,
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[dict[str, Any]],
    console: Console,
    when: str,
) -> dict[str, Any] | None:
    """Greedy Pass@1 on the tasks; None without tasks; {"not_judged": reason} where code cannot be judged safely.

    Of several processes the first one does it, and the others have None.
    """
    from ibft.data.templates import choose_template, template_in_use
    from ibft.evaluation.generate import extract_code, generate
    from ibft.evaluation.judge import judge_tasks, why_not_judged

    if not tasks or not trainer.accelerator.is_main_process:
        return None
    unsafe = config.eval.run_without_isolation
    if reason := why_not_judged(allow_limits=unsafe):
        return {"not_judged": reason}
    with console.progress(f"Pass@1 {when} training", len(tasks)) as advance, trainer.accelerator.autocast():
        completions = generate(
            trainer.model,
            tokenizer,
            [task["instruction"] for task in tasks],
            max_new_tokens=config.eval.max_new_tokens,
            batch_size=config.eval.batch_size,
            template=choose_template(template_in_use(config.data.template, trainer.data.formats), tokenizer),
            progress=advance,
        )
    verdicts = judge_tasks(tasks, [extract_code(completion) for completion in completions], allow_limits=unsafe)
    passed = sum(verdict.passed for verdict in verdicts)
    return {"passed": passed, "tasks": len(tasks), "value": passed / len(tasks)}


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """torch's alone while a run lasts; not touched where that is not wanted."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warns)


@dataclass
class Progress:
    """What a checkpoint keeps beside the trainer's state. run: whose it is (`ibft.trainer_state.fingerprint`)."""

    run: dict[str, Any]
    began: bool = False
    before: dict[str, Any] | None = None
    """Pass@1 before training."""
    tracks: bool = True

    def facts(self) -> dict[str, Any]:
        return {"run": self.run, "began": self.began, "pass_at_1_before": self.before}

    def go_on(self, facts: dict[str, Any]) -> None:
        self.began, self.before = bool(facts.get("began")), facts.get("pass_at_1_before")

    def track(self, accelerator: "Accelerator", row: dict[str, Any], console: Console) -> None:
        """Hands a row to the trackers; one that fails is said once, and no reason to stop."""
        if not self.tracks:
            return
        try:
            accelerator.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
        except Exception as error:  # whatever a tracker's own library raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            console.notice(f"the trackers (train.report_to) failed and get no more rows: {reason}")
            self.tracks = False
