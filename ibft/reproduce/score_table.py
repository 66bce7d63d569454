"""Scores of reproductions as tables: a row for every number (CSV), and Pass@1, pass@k and Pass@k(k) by model (Markdown,
page)."""

import csv
import io
from collections.abc import Mapping, Sequence

from ibft.evaluation.score_tables import Table, markdown_row, percent
from ibft.reproduce.over_seeds import Report, score_rows

COLUMNS = ("run", "suite", "temperature", "model", "k", "m", "value", "low", "high", "problems", "seeds", "n")


def score_tables(report: Report) -> list[Table]:
    """One for each suite and temperature, in percent."""
    rows = score_rows(report)
    tables = []
    for suite, temperature in dict.fromkeys((row["suite"], row["temperature"]) for row in rows):
        mine = [row for row in rows if (row["suite"], row["temperature"]) == (suite, temperature)]
        cells = list(dict.fromkeys((row["k"], row["m"]) for row in mine if row["m"] in (1, row["k"])))
        cells.sort(key=lambda cell: (cell[1] > 1, cell))
        body = []
        for model in dict.fromkeys(row["model"] for row in mine):
            found = {(row["k"], row["m"]): row for row in mine if row["model"] == model}
            of = next(iter(found.values()))
            scores = [percent(found[cell]) if cell in found else "" for cell in cells]
            body.append([model, *scores, str(of["seeds"] or ""), str(of["n"])])
        at = "" if temperature is None else f", temperature {temperature:g}"
        header = ["", *(f"pass@{k}" if m == 1 else f"Pass@{k}({m})" for k, m in cells), "seeds", "n"]
        tables.append(Table(f"{suite}{at}: {mine[0]['problems']} problems, in %, with 95 % interval", header, body))
    return tables


def to_csv(reports: Mapping[str, Report]) -> str:
    """Fractions; no interval where there is one problem, no temperature where the rows have none. reports: by run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run, report in reports.items():
        writer.writerows({"run": run} | row for row in score_rows(report))
    return text.getvalue()


def to_markdown(reports: Mapping[str, Report]) -> str:
    lines = []
    for run, report in reports.items():
        lines.append(f"# {run}\n")
        for table in score_tables(report):
            lines += [f"### {table.title}\n", *markdown_rows(table), ""]
    return "\n".join(lines)


def markdown_rows(table: Table) -> Sequence[str]:
    return [markdown_row(table.header), markdown_row(["---"] * len(table.header)), *map(markdown_row, table.rows)]
