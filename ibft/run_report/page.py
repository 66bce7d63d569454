"""Runs as one HTML file: facts, outcome, warnings, scores, then curves, settings and rows.

The file needs nothing but itself: charts are in it, and no script. All that comes from a run's files is escaped.
"""

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ibft.errors import ConfigError
from ibft.evaluation.score import write
from ibft.evaluation.score_tables import Table
from ibft.reproduce.page import PAGE, table
from ibft.reproduce.sentences import counted
from ibft.run_report import tables
from ibft.run_report.curves import GRADIENTS, LATENT, LATENT_NOTE, LOSS, LOSS_NOTE, SPEED, charts
from ibft.run_report.heat import heats
from ibft.run_report.read_run import Run, read_runs
from ibft.run_report.style import STYLE

ENDINGS = (".html", ".htm")


def run_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the page, and says where it is and what could not be read.

    Raises:
        ConfigError: a folder holds no run or is named twice, or `out` is no HTML file's name.
        DataError: a file cannot be read or written.
    """
    out = Path(os.path.expanduser(out))  # a shell leaves the ~ of --out=~/page.html
    if out.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--out: got {out}, expected a name that ends with {' or '.join(ENDINGS)}")
    runs = read_runs(folders)
    write(out, make_page(runs))
    from ibft.console import Console

    console = Console()
    for run in runs:
        for note in run.notes:
            console.notice(f"{run.path}: {note}")
    console.line(f"report: {out}")


def make_page(runs: Sequence[Run]) -> str:
    """The same bytes for the same folders."""
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    made: dict[str, tuple[str, Callable[[Sequence[Run]], str]]] = {
        "runs": ("Facts", facts_section),
        "outcome": ("Outcome", outcome_section),
        "warnings": ("Warnings", warnings_section),
        "scores": ("Scores", scores_section),
        "loss": ("Loss", lambda runs: charts(LOSS, runs, LOSS_NOTE)),
        "latent": ("Bottleneck", lambda runs: charts(LATENT, runs, LATENT_NOTE) + heats(runs)),
        "gradients": ("Gradients", lambda runs: charts(GRADIENTS, runs)),
        "speed": ("Speed and memory", lambda runs: charts(SPEED, runs)),
        "settings": ("Settings", settings_section),
        "rows": ("Logged rows", rows_section),
    }
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in made.items())
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{section(runs)}</section>' for name, (heading, section) in made.items()
    )
    return PAGE.format(title=escape(title), style=STYLE, about=about(runs), links=links, body=body)


def about(runs: Sequence[Run]) -> str:
    finished = sum(run.result is not None for run in runs)
    said = f"{finished} of {len(runs)} finished" if len(runs) > 1 else tables.state(runs[0])
    models = dict.fromkeys(tables.text(run.setting("model.name_or_path")) for run in runs)
    return escape("; ".join(filter(None, [said, *models]))) + "."


# --- sections -------------------------------------------------------------------------------------


def facts_section(runs: Sequence[Run]) -> str:
    differ, same, rest = tables.facts(runs)
    return f"{of(differ)}{of(same)}<details><summary>Versions and places</summary>{of(rest)}</details>"


def outcome_section(runs: Sequence[Run]) -> str:
    if not any(run.steps or run.evaluations for run in runs):
        return "<p>Nothing is logged yet.</p>"
    return of(tables.outcome(runs)) + of(tables.pass_at_1(runs))


def warnings_section(runs: Sequence[Run]) -> str:
    """Of result.json, steps that were not finite, and files that could not be read."""
    said = [(run, text) for run in runs for text in warnings_of(run)]
    said += [(run, note) for run in runs for note in run.notes]
    several = len(runs) > 1
    items = "".join(f"<li>{escape(f'{run.name}: ' if several else '')}{escape(text)}</li>" for run, text in said)
    parts = [f'<ul class="warnings">{items}</ul>' if items else "", of(tables.faults(runs))]
    if unfinished := [run.name for run in runs if run.result is None]:
        named = f"{', '.join(unfinished)}: no" if several else "No"
        parts.append(f"<p>{escape(named)} result.json yet, which holds what a run was warned of.</p>")
    return "".join(parts) or "<p>None.</p>"


def warnings_of(run: Run) -> list[str]:
    found = (run.result or {}).get("warnings")
    return [tables.text(warning) for warning in found] if isinstance(found, list) else []


def scores_section(runs: Sequence[Run]) -> str:
    """Reports of `evaluate score` and `evaluate retain` that lie in the run folders."""
    if not any(run.scores for run in runs):
        return (
            "<p>No scores lie in the run folder. What <code>ibft-fast evaluate score -o RUN/scores.json</code> writes "
            "would be shown here.</p>"
        )
    parts = [of(tables.scores(runs))]
    for run in runs:
        for report in run.scores:
            said = "".join(f"<p>{escape(text)}</p>" for text in report.said)
            name = escape(f"{run.name}: {report.file}")
            parts.append(f"<details><summary>{name}</summary>{said}{''.join(map(of, report.tables))}</details>")
    return "".join(parts)


def settings_section(runs: Sequence[Run]) -> str:
    differ, same = tables.settings(runs)
    parts = []
    if len(runs) > 1:
        parts.append(of(differ) or "<p>No setting differs.</p>")
    if same.rows:
        what = f"{counted(len(same.rows), 'setting')}{' that all runs share' if len(runs) > 1 else ''}"
        parts.append(f"<details><summary>{what}</summary>{of(same)}</details>")
    return "".join(parts) or "<p>No configuration could be read.</p>"


def rows_section(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        count, shown = len(run.steps) + len(run.evaluations), tables.logged(run)
        few = f", {len(shown.rows)} of them shown" if len(shown.rows) < count else ""
        summary = escape(f"{run.name}: {counted(count, 'row')}{few}")
        parts.append(f"<details><summary>{summary}</summary>{of(shown)}</details>")
    return "".join(parts)


def of(made: Table) -> str:
    """Nothing where there are no rows."""
    return table(made.title, made.header, made.rows)
