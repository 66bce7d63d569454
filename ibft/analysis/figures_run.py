"""`ibft-fast analyze figures`: figures and table of one reproduction or of several, from their reports alone.

DIR/fig*.png, .svg     of one run; of several in DIR/<run>/, run = the name of its folder
DIR/table.csv, .md     over all runs: model x suite x Pass@k(m), with intervals
"""

from collections.abc import Sequence
from pathlib import Path

from ibft.errors import ConfigError


def run_figures(runs: Sequence[str], out: str) -> None:
    """Draws all that the reports have the rows for; a line says where each is, or why it is not drawn.

    Args:
        runs: folders with a report.json, or paths of reports.
        out: folder.

    Raises:
        ConfigError: no run, or two of one name.
        DataError: a report cannot be read or is broken; the folder cannot be written.
        SetupError: matplotlib is missing.
    """
    paths = named_runs(runs)
    from ibft.evaluation.score import write
    from ibft.evaluation.score_plots import need_matplotlib

    need_matplotlib("analyze figures")

    from ibft.analysis.figures import draw_figures
    from ibft.console import Console
    from ibft.reproduce.claims import barrier_claims
    from ibft.reproduce.read_report import read_report
    from ibft.reproduce.score_table import to_csv, to_markdown

    reports = {name: read_report(path) for name, path in paths.items()}
    console = Console()
    for name, report in reports.items():
        folder = Path(out) / name if len(reports) > 1 else Path(out)
        for line in draw_figures(report, folder):
            console.line(line)
        console.line(f"{name}: {barrier_claims(report)[0]['text']}")
    for ending, text in (("csv", to_csv(reports)), ("md", to_markdown(reports))):
        path = Path(out) / f"table.{ending}"
        write(path, text)
        console.line(f"table: {path}")


def named_runs(runs: Sequence[str]) -> dict[str, Path]:
    """name -> path of its report. Raises ConfigError: none, or two of one name."""
    if not runs:
        raise ConfigError("analyze figures: name at least one run")
    paths: dict[str, Path] = {}
    for run in runs:
        path = Path(run).expanduser()
        report = path if path.is_file() or path.suffix == ".json" else path / "report.json"
        folder = report.resolve().parent.name
        name = folder if report.name == "report.json" else report.stem
        if name in paths:
            raise ConfigError(
                f"RUN: {paths[name]} and {report} are both named {name}; figures go to a folder of that name"
            )
        paths[name] = report
    return paths
