"""Runs as folders, made by hand, and their page, read."""

import json
import re
from html.parser import HTMLParser

import yaml
from typer.testing import CliRunner

from ibft.cli import app
from ibft.load_config import load_config
from ibft.run_report.page import make_page
from ibft.run_report.read_run import read_runs

STEP = {
    "epoch": 0, "ce": 1.0, "kl": 64.0, "ce_z": 3.0, "mu_abs_mean": 0.5, "var_mean": 0.75, "active_dims": 0.875,
    "kl_dim_min": 0.5, "kl_dim_median": 4.0, "kl_dim_max": 9.0,
    "grad_norm_lora": 0.4, "grad_norm_bottleneck": 0.02, "learning_rate": 1e-3, "tokens_per_second": 1500.0,
    "memory_mib": 640.0,
}  # fmt: skip
ROWS = [
    {**STEP, "step": 1, "loss": 2.5, "time": 1000.0},
    {**STEP, "step": 10, "loss": 1.75, "kl": 16.0, "active_dims": 0.5, "time": 1010.0},
    {"step": 10, "eval_ce": 0.8125, "time": 1011.0},
    {**STEP, "step": 20, "loss": 1.25, "kl": 8.0, "active_dims": 0.25, "memory_mib": 700.0, "time": 1020.0},
    {"step": 20, "eval_ce": 0.9375, "time": 1021.0},
]
MANIFEST = {
    "started": "2026-01-02T03:04:05+00:00", "python": "3.12.1", "platform": "Linux-6",
    "commit": "0123456789abcdef-dirty", "versions": {"torch": "2.99.0", "triton": None}, "device": "A card",
    "dtype": "bfloat16", "seed": 7, "data_sha256": "fedcba9876543210ffff", "ib_layer": 5,
    "memory": {"predicted_bytes": 512 * 2**20},
}  # fmt: skip
RESULT = {
    "steps": 20, "tokens_per_second": 1234.4, "training_seconds": 7500, "peak_memory_mib": 712.6,
    "pass_at_1": {
        "before": {"passed": 2, "tasks": 8, "value": 0.25}, "after": {"passed": 4, "tasks": 8, "value": 0.5},
    },
    "warnings": ["step 20: over-compression: lower ib.alpha"],
}  # fmt: skip


def write_run(folder, *overrides, rows=ROWS, manifest=MANIFEST, result=RESULT, faults=None, latent=()):
    """Files as a run leaves them. latent: rows of latent.jsonl, of which there is none without."""
    folder.mkdir(parents=True)
    config = load_config(None, ["ib.latent_dim=16", "train.max_steps=20", *overrides])[0]
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if latent:
        (folder / "latent.jsonl").write_text("".join(json.dumps(row) + "\n" for row in latent))
    for name, content in (("manifest", manifest), ("result", result), ("non_finite", faults)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """tags: (name, attributes) of each. text: of the body, in one line. tables: by caption, rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.words, self.open, self.wrong, self.rows = [], [], [], [], []
        self.tables, self.caption = {}, ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "table":
            self.rows = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.wrong += [] if self.open and self.open[-1] == tag else [tag]
        self.open = self.open[:-1]
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open[-1:] == ["caption"]:
            self.caption = data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data

    def fact(self, name, table="Run"):
        return next(row[1:] for row in self.tables[table] if row[0] == name)

    def labels(self):
        return [
            attributes["aria-label"] for tag, attributes in self.tags if tag == "svg" and "aria-label" in attributes
        ]

    def text_of_maps(self):
        return " ".join(label for label in self.labels() if label.startswith("KL of each latent dimension"))


def page_of(*folders):
    return Page(make_page(read_runs(folders)))


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])
