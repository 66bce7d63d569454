"""A reproduction as one HTML file: its claims first, then figures, scores, training, settings, how to make it again.

The file needs nothing but itself: figures are in it, and no script. It can be read on a phone: figures shrink with the
page, tables scroll in a box of their own.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ibft.analysis.figures import FIGURES
from ibft.evaluation.score import write
from ibft.reproduce.claims import TOPICS, make_claims
from ibft.reproduce.over_seeds import Report
from ibft.reproduce.page_style import STYLE
from ibft.reproduce.score_table import score_tables
from ibft.reproduce.sentences import Claim, counted

SHOWN = 6  # claims of a topic; more are folded
MARKS = {
    "higher": "▲", "lower": "▼", "more memorised": "▼", "less memorised": "▲", "exists": "✓", "unmeasured": "?",
}  # fmt: skip
TRAINING = {
    "steps": "steps", "eval_ce": "held-out CE", "ce": "CE", "kl": "KL, nats", "ce_z": "CE_z",
    "active_dims": "dims in use",
}  # fmt: skip
READING = (
    "An interval is a 95 % interval over problems and training seeds, of an AUC over rows; a range is that over seeds. "
    "{seeds} Each is taken alone: of twenty comparisons without any difference one is told apart by chance. “Expected” "
    "is what the paper leads one to expect."
)
ONE_SEED = "With one training seed nothing about a fine-tuned model is told apart: another seed may say the opposite."
SEEDS = (
    "{count} seeds can show that a difference is no single seed's doing; where seeds make most of the spread, an "
    "interval of few misses the truth often (of three, 1 time in 4), so one that barely leaves out 0 does not stand. "
    "All seeds start from the same {bases}: none says what another would do."
)


def write_page(report: Report, figures_folder: Path, path: Path) -> None:
    """Figures that are not in the folder are left out, and named.

    Raises:
        DataError: the file cannot be written.
    """
    claims = report.get("claims") or make_claims(report)
    title = f"IB-FT reproduced: {report['name']}"
    sections = {
        "claims": ("What the numbers say", claims_section(report, claims)),
        "models": ("Models", models_section(report)),
        "figures": ("Figures", figures_section(figures_folder)),
        "scores": ("Scores", scores_section(report)),
        "training": ("Training", training_section(report)),
        "settings": ("Settings and versions", settings_section(report)),
        "again": ("Make it again", again_section()),
    }
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, (heading, _) in sections.items())
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>'
        for name, (heading, content) in sections.items()
    )
    write(path, PAGE.format(title=escape(title), style=STYLE, about=about(report), links=links, body=body))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{about}</p><nav aria-label="Sections">{links}</nav></header>
<main>{body}</main>
</body>
</html>
"""


def about(report: Report) -> str:
    """One line: what, on what, of which source."""
    tuned = sum(model["base"] is not None for model in report["models"])
    parts = [report.get("what"), counted(tuned, "fine-tuned model"), counted(len(report.get("seeds") or []), "seed")]
    parts += [f"on {report['device']}" if report.get("device") else None]
    commit, _, dirty = (report.get("commit") or "").partition("-")
    parts += [f"commit {commit[:12]}{' with changes' if dirty else ''}" if commit else None]
    return escape("; ".join(part for part in parts if part)) + "."


# --- sections -------------------------------------------------------------------------------------


def reading(report: Report) -> str:
    """How the claims are to be read."""
    count, bases = len(report.get("seeds") or []), [m["name"] for m in report["models"] if m["base"] is None]
    if count < 2:
        return READING.format(seeds=ONE_SEED)
    started = " and the same ".join(bases) or "base"
    return READING.format(seeds=SEEDS.format(count=count, bases=started))


def claims_section(report: Report, claims: Sequence[Claim]) -> str:
    parts = [f'<p class="reading">{escape(reading(report))}</p>']
    for topic in dict.fromkeys([*TOPICS, *(claim["topic"] for claim in claims)]):
        mine = [claim for claim in claims if claim["topic"] == topic]
        if not mine:
            continue
        parts.append(f"<h3>{escape(TOPICS.get(topic, topic))}</h3>{claims_list(mine[:SHOWN])}")
        if rest := mine[SHOWN:]:
            parts.append(f"<details><summary>{len(rest)} more</summary>{claims_list(rest)}</details>")
    return "".join(parts)


def claims_list(claims: Iterable[Claim]) -> str:
    return f'<ul class="claims">{"".join(map(claim_item, claims))}</ul>'


def claim_item(claim: Claim) -> str:
    kind, mark = claim["verdict"].replace(" ", "-"), MARKS.get(claim["verdict"], "–")
    text = escape(claim["text"]).replace(" %", "&nbsp;%")
    return f'<li class="{escape(kind)}"><span class="mark" aria-hidden="true">{mark}</span><span>{text}</span></li>'


def models_section(report: Report) -> str:
    rows = []
    for model in report["models"]:
        changes = ", ".join(f"{key}={shown(value)}" for key, value in (model.get("changes") or {}).items())
        rows.append([model["name"], model["what"], model["base"] or "", changes])
    return table("Models", ["name", "what", "fine-tuned from", "changed settings"], rows)


def figures_section(folder: Path) -> str:
    parts, absent = [], []
    for figure in FIGURES:
        try:
            svg = (folder / f"{figure.name}.svg").read_bytes()
        except OSError:
            absent.append(figure.name)
            continue
        data, caption = base64.b64encode(svg).decode(), escape(figure.caption)
        parts.append(
            f'<figure id="{figure.name}"><img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
            f"<figcaption><b>{figure.name}.</b> {caption}</figcaption></figure>"
        )
    if absent:
        parts.append(f"<p>Not drawn, for want of rows: {', '.join(absent)}.</p>")
    return "".join(parts)


def scores_section(report: Report) -> str:
    tables = score_tables(report)
    return "".join(table(one.title, one.header, one.rows) for one in tables) or "<p>No samples were judged.</p>"


def training_section(report: Report) -> str:
    rows, warnings = [], []
    for row in report["training"]:
        seed = "" if row["seed"] is None else str(row["seed"])
        rows.append([row["model"], seed, *(number(row.get(name)) for name in TRAINING)])
        warnings += [f"{row['model']}, seed {seed}: {warning}" for warning in row.get("warnings") or ()]
    if not rows:
        return "<p>Nothing was trained.</p>"
    said = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return table("How each run ended", ["model", "seed", *TRAINING.values()], rows) + (
        f'<h3>Warnings</h3><ul class="warnings">{said}</ul>' if said else "<p>No run gave a warning.</p>"
    )


def settings_section(report: Report) -> str:
    settings = [[key, shown(value)] for key, value in flattened(report.get("settings") or {})]
    versions = [[name, version or "not installed"] for name, version in (report.get("versions") or {}).items()]
    parts = [table("Settings", ["setting", "value"], settings), table("Versions", ["package", "version"], versions)]
    parts.append(f"<p>Commit: <code>{escape(report.get('commit') or 'not known')}</code></p>")
    return "".join(parts)


def again_section() -> str:
    return (
        "<p>With recipe.yaml, which lies beside this page and holds the settings above:</p>"
        "<pre><code>ibft-fast reproduce from recipe.yaml -o again</code></pre>"
        "<p>Figures and tables alone, from report.json:</p>"
        "<pre><code>ibft-fast analyze figures report.json -o figures</code></pre>"
    )


# --- pieces ---------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In a box that scrolls by itself, by keys too. Nothing where there are no rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def shown(value: Any) -> str:
    """As a configuration has it: true, null, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flattened(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """section.key, value; of a list of trees each by its name or number."""
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(one.get("name", i)): one for i, one in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
