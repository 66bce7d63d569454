"""`ibft-fast analyze geometry`: how far apart the most and the least memorised examples lie, before and after
fine-tuning (explanation 2 of arXiv 2510.16022: plain fine-tuning widens that distance, the bottleneck shrinks it).

    two files of ids -> the same samples through each model -> pooled vectors -> metrics -> a report (JSON) -> tables

One model is in memory at a time, with one vector a sample and layer; of the models before it only the metrics are kept.
"""

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.config import BUNDLED
from ibft.data.encode import encode_rows, to_prompt_response
from ibft.data.ids import Ids, read_ids
from ibft.data.samples import Sample
from ibft.data.sources import Row
from ibft.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor

    from ibft.analysis.geometry import Geometry
    from ibft.console import Console
    from ibft.evaluation.local_model import LocalModel

Report = dict[str, Any]
Measured = dict[str, dict[int, "Geometry"]]  # of each model, at each layer
POOLS = ("mean", "last")
FEWEST_RESAMPLES = 100  # with fewer, the ends of an interval are single resamples
HEADINGS = {"l2": "L2", "l2_normalised": "L2 / norm", "angle": "angle, °", "angle_centred": "centred angle, °"}


def run_geometry(
    *, models: Mapping[str, tuple[str, str | None]], data: str, most: str, least: str, reference: str | None = None,
    layers: str | Sequence[int] = "auto", pool: str = "mean", quantization: str = "none", device: str = "auto",
    batch_size: int = 8, max_length: int = 2048, add_eos: bool = True, split: str = "train", bootstrap: int = 1000,
    seed: int = 0, out: str = "geometry.json",
) -> None:  # fmt: skip
    """Measures the two groups in each model, prints a table and writes the report.

    Args:
        models: name -> (folder, hub id or `bundled:tiny`; folder of a PEFT adapter or None). They must have one
            tokenizer, depth and hidden size. Each is compared with those before it.
        data: file, hub id or `bundled:tiny`, rows as training takes them. split: of a hub data set or the bundled one.
        most, least: files of ids, JSON: {"ids": [numbers of rows, from 0]}; other keys are ignored.
        reference: the same, of ordinary examples, for the centred angle; default as many rows as both groups have,
            drawn from the others.
        layers: "auto" (where `ib.layer=auto` puts the bottleneck), "all" (0 .. L) or numbers, as "5,10,20".
        pool: mean or last, over the tokens of the response.
        quantization: none or nf4. device: auto, cpu, cuda.
        batch_size: samples at once. max_length, add_eos: as `data.max_length` and `data.add_eos` of training.
        bootstrap: resamples. seed: of them, and of the reference drawn.

    Raises:
        ConfigError: an argument is out of range, a folder holds no adapter, or the models cannot be compared.
        DataError: the data or a file of ids cannot be read, an id is no row's, the groups overlap, or no sample of a
            group is left; the report cannot be written.
        SetupError: no such model or device. NonFiniteError: a model gives NaN or infinity. OutOfMemoryError.
    """
    from ibft.evaluation.generate_samples import DEVICES, QUANTIZATIONS, check_choice, check_out

    check_numbers(batch_size=batch_size, max_length=max_length, bootstrap=bootstrap, seed=seed)
    check_choice("--pool", pool, POOLS)
    check_choice("--quantization", quantization, QUANTIZATIONS)
    check_choice("--device", device, DEVICES)
    if not models:
        raise ConfigError("analyze geometry: name at least one model")
    check_out(out)

    from ibft.analysis.memorization import load_data
    from ibft.data.ids import hash_rows

    rows, on_disk = load_data(data, split)
    ids = read_groups({"most": most, "least": least, "reference": reference}, rows, data, seed)
    if on_disk and all(model == BUNDLED for model, _ in models.values()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is on disk: no library need ask the network for anything

    from ibft.analysis.geometry import LEVEL, draw_weights
    from ibft.console import Console
    from ibft.evaluation.local_model import LocalModel, check_adapter
    from ibft.evaluation.score import write

    hashes = {name: adapter and check_adapter(adapter) for name, (_, adapter) in models.items()}
    here = {name: LocalModel.of(model, adapter, quantization, device) for name, (model, adapter) in models.items()}
    depth = common_depth(here)
    chosen = choose_layers(layers, depth)
    groups = encode_groups(ids, rows, data, here, max_length=max_length, add_eos=add_eos)

    console = Console()
    first = next(iter(here.values()))
    where = first.name() if quantization == "none" else f"{quantization}, {first.name()}"
    sizes = ", ".join(f"{len(group.samples):,} {name}" for name, group in groups.items())
    console.line(f"geometry: {', '.join(models)} ({where}); {data}: {sizes}; {pool} over the response")
    data_sha256 = hash_rows(rows)
    notes = notes_of(groups, data_sha256, max_length, first.positions)
    for note in notes:
        console.notice(note)

    used = {name: group for name, group in groups.items() if group.samples}
    weights = draw_weights([len(group.samples) for group in used.values()], resamples=bootstrap, seed=seed)
    measured: Measured = {}
    for name, local in here.items():
        measured[name] = measure_layers(
            name,
            pool_groups(name, local, list(used.values()), chosen, pool, batch_size, console),
            used,
            chosen,
            weights,
        )

    report = {
        "definitions": definitions(),
        "models": [
            {"name": name, "model": model, "adapter": adapter, "adapter_sha256": hashes[name]}
            for name, (model, adapter) in models.items()
        ],
        "quantization": quantization, "device": first.name(), "data": data, "split": split,
        "data_sha256": data_sha256, "rows": len(rows), "max_length": max_length, "add_eos": add_eos,
        "groups": {name: group.report() for name, group in groups.items()},
        "layers": chosen, "depth": depth, "pool": pool, "batch_size": batch_size,
        "bootstrap": {"level": LEVEL, "resamples": bootstrap, "seed": seed}, "versions": all_versions(), "notes": notes,
        **results(measured),
    }  # fmt: skip
    show(report, console)
    write(Path(out).expanduser(), json.dumps(report, indent=1, allow_nan=False) + "\n")
    console.line(f"report: {out}: all metrics and layers, their definitions and every setting")


def check_numbers(*, batch_size: int, max_length: int, bootstrap: int, seed: int) -> None:
    """Raises ConfigError for the first that is out of range."""
    for option, value, least in (
        ("--batch-size", batch_size, 1),
        ("--max-length", max_length, 2),
        ("--bootstrap", bootstrap, FEWEST_RESAMPLES),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{option}: got {value}, expected {least} or more")


def choose_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Each once, in the order given. Raises ConfigError: not "auto", "all" or numbers in 0 .. depth."""
    from ibft.model import resolve_layer

    if layers == "auto":
        return [resolve_layer("auto", depth)]
    if layers == "all":
        return list(range(depth + 1))
    expected = f"--layers: got {layers}, expected auto, all or numbers with commas between them"
    parts = layers.split(",") if isinstance(layers, str) else layers
    try:
        found = [int(part) for part in parts]
    except ValueError:
        raise ConfigError(expected) from None
    if not found:
        raise ConfigError(expected)
    if wrong := [layer for layer in found if not 0 <= layer <= depth]:
        raise ConfigError(f"--layers: got {wrong[0]}, expected 0 .. {depth} (the model has {depth} layers)")
    return list(dict.fromkeys(found))


def common_depth(models: Mapping[str, "LocalModel"]) -> int:
    """Number of blocks. Raises ConfigError: the models differ in it, or in their hidden size."""
    from ibft.model import load_model_config

    sizes = {}
    for name, local in models.items():
        config = load_model_config(local.config)
        sizes[name] = (config.num_hidden_layers, config.hidden_size)
    (first, expected), *others = sizes.items()
    for name, found in others:
        if found != expected:
            raise ConfigError(
                f"{name} has {found[0]} layers of size {found[1]}, {first} has {expected[0]} of {expected[1]}: "
                "only models of one shape can be compared"
            )
    return expected[0]


# --- ids to samples -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """samples: by row number. dropped: rows with no label left. truncated: how many are cut on the right."""

    ids: Ids
    samples: dict[int, Sample]
    dropped: list[int]
    truncated: int

    def report(self) -> Report:
        return {
            "file": self.ids.file, "sha256": self.ids.sha256, "n": len(self.samples), "ids": list(self.samples),
            "dropped": self.dropped, "truncated": self.truncated,
            "response_tokens": sum(len(s.input_ids) - s.prompt_length for s in self.samples.values()),
        }  # fmt: skip


def read_groups(files: Mapping[str, str | None], rows: Sequence[Row], data: str, seed: int) -> dict[str, Ids]:
    """most, least, reference. Raises DataError: see `read_ids`; or a row is in two of them."""
    groups: dict[str, Ids] = {}
    owner: dict[int, str] = {}
    for name, file in files.items():
        if file is None:
            others = [number for number in range(len(rows)) if number not in owner]
            count = min(len(owner), len(others))
            groups[name] = Ids(None, None, sorted(random.Random(seed).sample(others, count)))
            continue
        groups[name] = read_ids(f"--{name}", file, len(rows), data)
        for number in groups[name].numbers:
            if number in owner:
                raise DataError(f"--{name}: {file} has id {number}, which --{owner[number]} has too")
            owner[number] = name
    return groups


def encode_groups(
    ids: Mapping[str, Ids], rows: Sequence[Row], data: str, models: Mapping[str, "LocalModel"],
    *, max_length: int, add_eos: bool,
) -> dict[str, Group]:  # fmt: skip
    """As the first model's tokenizer has it.

    Raises:
        DataError: a row is malformed, or no sample of most or least is left. ConfigError: another model's differs.
    """
    (first, local), *others = models.items()

    def encode(tokenizer: Any) -> dict[str, Group]:
        return {
            name: encode_group(each, rows, data, tokenizer, max_length=max_length, add_eos=add_eos)
            for name, each in ids.items()
        }

    groups = encode(local.tokenizer)
    seen = {local.config.name_or_path}
    for name, other in others:
        if other.config.name_or_path not in seen and encode(other.tokenizer) != groups:
            raise ConfigError(f"{name} turns the samples into other tokens than {first}: expected one tokenizer")
        seen.add(other.config.name_or_path)
    for name in ("most", "least"):
        if not groups[name].samples:
            raise DataError(
                f"--{name}: none of the {len(ids[name].numbers):,} rows has a token of its response within "
                f"--max-length {max_length}"
            )
    return groups


def encode_group(ids: Ids, rows: Sequence[Row], data: str, tokenizer: Any, *, max_length: int, add_eos: bool) -> Group:
    """Row by row, so that it is known which ones are left out. Raises DataError: a row is malformed."""
    samples, dropped, truncated = {}, [], 0
    for number in ids.numbers:
        try:
            to_prompt_response(rows[number])
        except DataError as error:
            raise DataError(f"{data}, id {number}: {error}") from error
        try:
            encoded = encode_rows([rows[number]], tokenizer, max_length=max_length, add_eos=add_eos)
        except DataError:  # no label left
            dropped.append(number)
            continue
        samples[number] = encoded.samples[0]
        truncated += encoded.truncated
    return Group(ids, samples, dropped, truncated)


def notes_of(groups: Mapping[str, Group], data_sha256: str, max_length: int, positions: int | None) -> list[str]:
    notes = []
    for name, group in groups.items():
        if group.ids.data_sha256 not in (None, data_sha256):
            notes.append(f"{name}: {group.ids.file} was made for other data than these (its data_sha256)")
        if group.dropped:
            shown = ", ".join(map(str, group.dropped[:5])) + (", ..." if len(group.dropped) > 5 else "")
            rows = "row" if len(group.dropped) == 1 else "rows"
            why = f"no token of the response within {max_length:,} tokens"
            notes.append(f"{name}: {len(group.dropped):,} {rows} left out ({why}): {shown}")
        if group.truncated:
            notes.append(f"{name}: {group.truncated:,} samples are cut to {max_length:,} tokens")
        if len(group.samples) == 1:
            notes.append(f"{name}: a single example has no spread, so that there is no estimate and no interval")
    lengths = [len(sample.input_ids) for group in groups.values() for sample in group.samples.values()]
    if beyond := sum(length > positions for length in lengths) if positions else 0:
        notes.append(f"{beyond:,} samples go beyond the model's {positions:,} positions")
    if not groups["reference"].samples:
        notes.append("no row is left for the reference, so that there is no centred angle")
    return notes


# --- samples to metrics ---------------------------------------------------------------------------


def pool_groups(
    name: str, local: "LocalModel", groups: Sequence[Group], layers: Sequence[int], pool: str, batch_size: int,
    console: "Console",
) -> "Tensor":  # fmt: skip
    """[K, N, D], N the samples of all groups, one after the other. Nothing holds the model when this returns."""
    import torch

    from ibft.analysis.hidden_states import pooled_states
    from ibft.model import pad_id_of

    samples = [sample for group in groups for sample in group.samples.values()]
    try:
        model = local.load()
        with console.progress(name, len(samples)) as advance:
            return pooled_states(
                model, samples, layers=layers, pool="last" if pool == "last" else "mean", batch_size=batch_size,
                pad_id=pad_id_of(local.tokenizer), progress=advance,
            )  # fmt: skip
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise OutOfMemoryError("out of memory: try a smaller --batch-size, or --quantization nf4") from error
        raise


def measure_layers(
    name: str, pooled_KND: "Tensor", groups: Mapping[str, Group], layers: Sequence[int], weights: Sequence[Any]
) -> dict[int, "Geometry"]:
    """Raises NonFiniteError."""
    from ibft.analysis.geometry import measure

    found = {}
    for layer, pooled_ND in zip(layers, pooled_KND, strict=True):
        if not pooled_ND.isfinite().all():
            raise NonFiniteError(f"{name}: the hidden states of layer {layer} are not all finite")
        parts = pooled_ND.split([len(group.samples) for group in groups.values()])
        found[layer] = measure([part.numpy() for part in parts], weights)
    return found


def results(measured: Measured) -> Report:
    """Of every model and layer; then of every two models, the later less the earlier."""
    pairs = [(later, earlier) for earlier, later in combinations(measured, 2)]
    return {
        "results": [
            {"model": name, "layer": layer, **geometry.report()}
            for name, by_layer in measured.items()
            for layer, geometry in by_layer.items()
        ],
        "differences": [
            {"model": later, "minus": earlier, "layer": layer, **(geometry - measured[earlier][layer]).report()}
            for later, earlier in pairs
            for layer, geometry in measured[later].items()
        ],
    }


# --- the report -----------------------------------------------------------------------------------


def definitions() -> dict[str, str]:
    return {
        "hidden state": "layer 0: the embeddings; layer l: the output of decoder block l, without the final norm",
        "pool": "over the tokens of the response, EOS included where it is taught: their mean, or the last",
        "l2": "length of the difference of the two groups' means of pooled vectors",
        "l2_normalised": "l2 over the mean length of a pooled vector; the two groups count alike",
        "angle": "degrees between the two groups' means",
        "angle_centred": "degrees between them, seen from the reference group's mean in the same model",
        "sample": "of these very examples",
        "estimate": "of the populations that they stand for: what chance adds to squared lengths is taken off; null: "
        "an angle whose side is no longer than chance makes it",
        "low, high": "percentile bootstrap about the estimate, examples drawn with replacement within each group; null "
        "where there is no estimate",
        "differences": "model minus the other; both with the same examples in each resample",
    }


def all_versions() -> dict[str, str | None]:
    import numpy

    from ibft.evaluation.generate_samples import versions

    return {**versions(), "numpy": numpy.__version__}


def show(report: Report, console: "Console") -> None:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    layers, depth, level = report["layers"], report["depth"], f"{report['bootstrap']['level']:.0%} interval"
    if len(layers) > 1:
        names = [model["name"] for model in report["models"]]
        title = f"{HEADINGS['l2_normalised']}, most against least memorised: estimate and {level}"
        table = Table("layer", *map(escape, names), box=SIMPLE, title=title, title_justify="left")
        for layer in layers:
            cells = {e["model"]: " ".join(cell(e["l2_normalised"])) for e in report["results"] if e["layer"] == layer}
            table.add_row(f"{layer} of {depth}", *(cells[name] for name in names))
        console.rich.print(table)
        return
    title = f"layer {layers[0]} of {depth}, most against least memorised"
    table = Table("", "these examples", "estimate", level, box=SIMPLE, title=title, title_justify="left")
    for metric, heading in HEADINGS.items():
        table.add_row(heading)
        for entry in (*report["results"], *report["differences"]):
            minus = entry.get("minus")
            label = escape(f"  {entry['model']} - {minus}" if minus else f"  {entry['model']}")
            sample = number(entry[metric]["sample"], sign=minus is not None)
            table.add_row(label, sample, *cell(entry[metric], sign=minus is not None))
        table.add_section()
    console.rich.print(table)


def cell(value: Mapping[str, float | None], *, sign: bool = False) -> tuple[str, str]:
    """(estimate, interval), the interval not read as markup."""
    if value["estimate"] is None:
        return "none", ""
    low, high = (number(value[side], sign=sign) for side in ("low", "high"))
    return number(value["estimate"], sign=sign), f"\\[{low}, {high}]"


def number(value: float | None, *, sign: bool = False) -> str:
    """To three digits, or as many as stand before the point; the report has them all."""
    if not value:
        return "none" if value is None else "0"
    if abs(value) < 1e-4:
        return f"{value:{'+' if sign else ''}.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:{'+' if sign else ''}.{decimals}f}"
