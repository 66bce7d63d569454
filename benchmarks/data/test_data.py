"""Making data ready at the size of the paper's OriGen set: 200,000 rows tokenised, read from the cache, and packed.

The rows are those of new_codealpaca.jsonl.gz (../shared/data, or $IBFT_DATA) again and again, as JSON lines, with the
bundled tokenizer. Each round runs in a process of its own, whose peak is that of everything in it, libraries too.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.harness.comparison import Found, each
from benchmarks.harness.providers import Provider
from benchmarks.harness.result_rows import ROOT, WHERE, percentiles

pytestmark = pytest.mark.part("data")

FILE = Path(os.environ.get("IBFT_DATA", ROOT.parent / "shared" / "data")) / "new_codealpaca.jsonl.gz"
ROWS, LENGTH = 200_000, 2048
PREPARE = """
import json, resource, sys, time
from transformers import AutoTokenizer
from ibft.console import Console
from ibft.data.prepare import load_data
from ibft.load_config import load_config
from ibft.tiny import BASE_DIR
tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
config, _ = load_config(None, [f"data.path={sys.argv[1]}", "data.max_length=2048"])
start = time.perf_counter()
data = load_data(config, tokenizer, Console(to_stderr=True))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
samples = len(data.train.samples) + len(data.held_out.samples)
print(json.dumps({"seconds": seconds, "peak": peak, "samples": samples}))
"""
PACK = """
import json, resource, sys, time
from ibft.data.cache import cache_folder, read
from ibft.data.order import epoch_order, pack
(folder,) = (cache_folder() / "data").iterdir()
data, _ = read(folder.name)
order = epoch_order(len(data.samples), 42, 0)
lengths = data.lengths[order]
start = time.perf_counter()
packs = pack(lengths, 2048)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
padding = 1 - data.num_tokens / (2048 * len(packs))
print(json.dumps({"seconds": seconds, "peak": peak, "samples": len(data.samples), "padding": padding}))
"""
STEPS = {"tokenise": PREPARE, "read the cache": PREPARE, "pack": PACK}
PROVIDERS = {
    name: Provider(run=lambda _: (), obstacle_=lambda _: None if FILE.is_file() else f"no {FILE.name} (IBFT_DATA)")
    for name in STEPS
}
ROUNDS = {"tokenise": 1, "read the cache": 3, "pack": 3}


@dataclass(frozen=True)
class DataRate:
    """Of the harness's kind of comparison; a round is all of the rows."""

    rows: int
    providers: Mapping[str, Provider]

    bench = "data"
    one_thread = False
    columns = (
        "op", "provider", "rows", "max_length", "result", "p20_ms", "p50_ms", "p80_ms", "rounds", "rows_per_s",
        "peak_mib", "padding", *WHERE,
    )  # fmt: skip

    def key(self, device: torch.device) -> tuple[object, ...]:
        return (self.bench, self.rows, device)

    def title(self) -> str:
        return f"data: {self.rows:,} rows"

    def row(self, name: str) -> dict[str, object]:
        return {"op": "data", "provider": name, "rows": self.rows, "max_length": LENGTH}

    def rates(self, found: Found, device: torch.device) -> dict[str, object]:
        times = percentiles(found.times_ms)
        rate = {"rows_per_s": f"{1e3 * self.rows / float(times['p50_ms']):.0f}"} if times else {}
        return rate | (json.loads(found.note) if found.note else {})

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, Found]:
        """In their order: the first fills the cache that the others read."""
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, self.rows)
            environment = os.environ | {"IBFT_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
            for name in STEPS:
                times, more = [], {"peak_mib": "0"}
                for _ in range(ROUNDS[name]):
                    command = [sys.executable, "-c", STEPS[name], str(path)]
                    done = subprocess.run(
                        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
                    )  # fmt: skip
                    said = json.loads(done.stdout.splitlines()[-1])
                    assert said["samples"] == self.rows
                    times.append(1e3 * said["seconds"])
                    more["peak_mib"] = f"{max(said['peak'], float(more['peak_mib'])):.0f}"
                    if "padding" in said:
                        more["padding"] = f"{said['padding']:.4f}"
                found[name] = Found("ok", json.dumps(more), times)
        return {name: found[name] for name in names}


def write_rows(path: Path, count: int) -> None:
    from ibft.data.sources import load_rows

    given = load_rows(str(FILE))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(given[number % len(given)]) + "\n")


@each({"cpu": [ROWS]}, PROVIDERS)
def test_data(compare, device, provider, case):
    compare(DataRate(case, PROVIDERS), provider)
