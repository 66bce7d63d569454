"""What of a run is no curve, as rows of text: facts, first and last numbers, Pass@1, settings, faults, logged rows."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ibft.evaluation.score_tables import Table
from ibft.reproduce.page import flattened, number, shown
from ibft.run_report.read_run import Run, Tree, finite, part

UNSAID = "–"
NUMBERS = {
    "loss": "loss", "ce": "CE", "kl": "KL", "ce_z": "CE_z", "active_dims": "dims in use",
    "grad_norm_lora": "grad LoRA", "grad_norm_bottleneck": "grad bottleneck",
}  # fmt: skip
LESSER = (
    "data's sha256", "processes", "memory predicted", "started", "commit", "python", "versions", "checkpoints",
    "folder",
)  # fmt: skip
LISTED = 60  # logged rows of a run
ROWS_NAMED = 12  # of a step's data


def facts(runs: Sequence[Run]) -> tuple[Table, Table, Table]:
    """Those that differ, with the state, a column a run; those that several runs share; and the lesser ones. What no
    run says is left out."""
    columns = [facts_of(run) for run in runs]
    rows = [[name, *(column[name] or UNSAID for column in columns)] for name in columns[0]]
    rows = [row for row in rows if set(row[1:]) != {UNSAID}]
    main = [row for row in rows if row[0] not in LESSER]
    differ = [row for row in main if len(runs) == 1 or row[0] == "state" or len(set(row[1:])) > 1]
    header = ["", *(run.name for run in runs)]
    return (
        Table("Run" if len(runs) == 1 else "Runs", header, differ),
        Table("The same in all runs", ["", "all runs"], [row[:2] for row in main if row not in differ]),
        Table("Versions and places", header, [row for row in rows if row[0] in LESSER]),
    )


def facts_of(run: Run) -> dict[str, str]:
    said, manifest, lora = run.setting, run.manifest, part(run.config, "lora")
    versions = part(manifest, "versions")
    memory = finite(part(manifest, "memory").get("predicted_bytes"))
    commit, _, dirty = str(manifest.get("commit") or "").partition("-")
    return {
        "state": state(run),
        "steps": steps_taken(run),
        "base model": joined([said("model.name_or_path"), said("model.revision")], " at "),
        "quantisation": text(said("model.quantization")),
        "objective": objective(run),
        "LoRA": joined([f"{name} {text(lora[name])}" for name in ("r", "alpha", "dropout") if name in lora]),
        "data": text(said("data.path")),
        "data's sha256": text(manifest.get("data_sha256"))[:16],
        "device": joined([manifest.get("device"), manifest.get("dtype")]),
        "processes": text(manifest.get("processes")),
        "memory predicted": "" if memory is None else f"{memory / 2**20:,.0f} MiB",
        "seed": text(manifest.get("seed", said("runtime.seed"))),
        "started": text(manifest.get("started")),
        "training time": duration(run),
        "commit": f"{commit[:12]}{' with changes' if dirty else ''}",
        "python": joined([manifest.get("python"), manifest.get("platform")]),
        "versions": ", ".join(f"{name} {text(version) or 'not installed'}" for name, version in versions.items()),
        "checkpoints": ", ".join(run.checkpoints),
        "folder": str(run.path),
    }


def state(run: Run) -> str:
    if run.result is not None:
        return "finished"
    if run.faults and not run.faults[-1].get("skipped"):
        return "ended by a step that was not finite"
    last = max((row["time"] for row in (*run.steps, *run.evaluations) if finite(row.get("time"))), default=None)
    return f"under way, or stopped early{'' if last is None else f'; last row {at_time(last)}'}"


def at_time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # no such year
        return "at no known time"


def steps_taken(run: Run) -> str:
    taken = finite((run.result or {}).get("steps")) or max((row["step"] for row in run.steps), default=0)
    wanted, epochs = finite(run.setting("train.max_steps")), finite(run.setting("train.num_train_epochs"))
    if wanted is not None and wanted > 0:
        return f"{taken:,} of {wanted:,}"
    return f"{taken:,}{'' if epochs is None else f' ({epochs:g} epochs wanted)'}"


def objective(run: Run) -> str:
    """L with its weights, where, and how the KL is reduced."""
    ib = part(run.config, "ib")
    if finite(ib.get("alpha")) is None:
        return ""
    if ib["alpha"] == 0:
        return "CE (ib.alpha = 0: plain fine-tuning, no bottleneck)"
    layer = run.manifest.get("ib_layer") or ib.get("layer")
    where = ", ".join(map(text, layer)) if isinstance(layer, list) else text(layer)
    alpha, beta = (number(finite(ib.get(name))) for name in ("alpha", "beta"))
    return (
        f"CE + {alpha} (KL + {beta} CE_z); layer {where}, Z {text(ib.get('latent_dim'))}, "
        f"{text(ib.get('encoder'))} encoder, KL {text(ib.get('kl_reduction'))}"
    )


def duration(run: Run) -> str:
    """Of training, without Pass@1; of a run without result from its first row to its last, stops in between too."""
    if (seconds := finite((run.result or {}).get("training_seconds"))) is not None:
        return in_words(seconds)
    times = [row["time"] for row in (*run.steps, *run.evaluations) if finite(row.get("time")) is not None]
    return f"{in_words(max(times) - min(times))} from the first row to the last" if len(times) > 1 else ""


def in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02} min"


# --- numbers --------------------------------------------------------------------------------------


def outcome(runs: Sequence[Run]) -> Table:
    """First and last value of what is logged, the lowest held-out CE, speed and memory. Columns of nothing go."""
    header = ["run", "held-out CE, lowest", *NUMBERS.values(), "tokens/s", "peak MiB"]
    rows = []
    for run in runs:
        result = run.result or {}
        speed = finite(result.get("tokens_per_second")) or last(run.values("tokens_per_second"))
        peak = finite(result.get("peak_memory_mib")) or max(run.values("memory_mib"), default=None)
        rows.append([
            run.name, lowest(run), *(first_to_last(run.values(key), key == "active_dims") for key in NUMBERS),
            whole(speed), whole(peak),
        ])  # fmt: skip
    filled = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return narrow("First → last", [header[i] for i in filled], [[row[i] for i in filled] for row in rows], most=3)


def narrow(title: str, header: list[str], rows: list[list[str]], *, most: int = 1) -> Table:
    """With up to so many rows on its side: one is then no wider than a phone, three than a desk."""
    if len(rows) <= most:
        header, *rows = [list(line) for line in zip(header, *rows, strict=True)]
    return Table(title, header, rows)


def lowest(run: Run) -> str:
    there = [(value, step) for step, value in run.curve("eval_ce") if value is not None]
    return f"{number(min(there)[0])} at step {min(there)[1]:,}" if there else ""


def first_to_last(values: Sequence[float], percent: bool) -> str:
    if not values:
        return ""
    return " → ".join(f"{100 * value:.3g} %" if percent else number(float(value)) for value in (values[0], values[-1]))


def last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def pass_at_1(runs: Sequence[Run]) -> Table:
    """No rows where no run was asked to solve tasks."""
    rows = []
    for run in runs:
        found = part(run.result, "pass_at_1")
        before, after = part(found, "before"), part(found, "after")
        if before or after:
            values = [finite(side.get("value")) for side in (before, after)]
            change = "" if None in values else f"{100 * (values[1] - values[0]):+.1f} points"  # type: ignore[operator]
            rows.append([run.name, solved(before), solved(after), change])
    return narrow("Pass@1, one greedy completion a task", ["run", "before", "after", "change"], rows)


def solved(side: Tree) -> str:
    if "not_judged" in side:
        return f"not judged: {text(side['not_judged'])}"
    value = finite(side.get("value"))
    return "" if value is None else f"{100 * value:.1f} % ({text(side.get('passed'))} of {text(side.get('tasks'))})"


def scores(runs: Sequence[Run]) -> Table:
    """Of every report in the run folders; a column a score."""
    reports = [(run, report) for run in runs for report in run.scores]
    names = list(dict.fromkeys(name for _, report in reports for name in report.values))
    rows = [
        [run.name, report.file, *(percent_of(report.values.get(name)) for name in names)] for run, report in reports
    ]
    return narrow("Scores, in %", ["run", "file", *names], rows)


def percent_of(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


# --- settings -------------------------------------------------------------------------------------


def settings(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Those that differ, a column a run, and those that all runs share."""
    flat = [dict(flattened(run.config)) for run in runs]
    differ, same = [], []
    for key in dict.fromkeys(key for tree in flat for key in tree):
        values = [shown(plain(tree[key])) if key in tree else UNSAID for tree in flat]
        if len(set(values)) == 1:
            same.append([key, values[0]])
        else:
            differ.append([key, *values])
    header = ["setting", *(run.name for run in runs)]
    return Table("Settings that differ", header, differ), Table("Settings", ["setting", "value"], same)


def plain(value: Any) -> Any:
    """As JSON can have it: YAML knows dates."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


# --- what went wrong, and the rows ----------------------------------------------------------------


def faults(runs: Sequence[Run]) -> Table:
    """Steps that were not finite."""
    rows = []
    for run in runs:
        for fault in run.faults:
            of, parts = fault.get("rows"), part(fault, "parts")
            numbers = [text(row) for row in of] if isinstance(of, list) else []
            more = f" and {len(numbers) - ROWS_NAMED} more" if len(numbers) > ROWS_NAMED else ""
            rows.append([
                run.name, text(fault.get("step")), "left out" if fault.get("skipped") else "ended the run",
                ", ".join(f"{name} {text(value)}" for name, value in parts.items()),
                ", ".join(numbers[:ROWS_NAMED]) + more,
            ])  # fmt: skip
    return Table("Steps that were not finite", ["run", "step", "what came of it", "values", "rows of the data"], rows)


def logged(run: Run) -> Table:
    """Every logged row, or of many evenly spaced ones, with first and last."""
    rows = sorted((*run.steps, *run.evaluations), key=lambda row: (row["step"], "eval_ce" in row))
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "time")]
    if len(rows) > LISTED:
        rows = [rows[round(index * (len(rows) - 1) / (LISTED - 1))] for index in range(LISTED)]
    body = [[f"{row['step']:,}", *(number(finite(row.get(name))) for name in names)] for row in rows]
    return Table(run.name, ["step", *names], body)


# --- words ----------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Empty for nothing."""
    return "" if value is None else shown(plain(value))


def joined(values: Sequence[Any], by: str = ", ") -> str:
    return by.join(filter(None, map(text, values)))
