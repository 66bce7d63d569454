"""Where a reproduction's things lie: its folder, its data, and who is asked what."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.config import BUNDLED, Config
from ibft.errors import DataError
from ibft.hashes import hash_file
from ibft.load_config import load_config
from ibft.reproduce.recipe import BASES, Recipe, folder_name, overrides_of

Tree = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where things lie: `out` the reproduction's folder. Files and hub ids of the data, by use."""

    recipe: Recipe
    out: Path
    config: Config  # of training, as all models share it
    data: str
    held_out: str | None
    problems: Mapping[str, str | None]  # of each suite
    comparison: Mapping[str, str]
    judge_jobs: int  # samples judged at once by a job

    @property
    def parts(self) -> Path:
        return self.out / "parts"

    @property
    def model(self) -> Tree:
        """How a model is loaded to be asked: as it was trained."""
        return {"quantization": self.config.model.quantization}

    @property
    def bases(self) -> tuple[str, ...]:
        return BASES if self.recipe.bases else ("base",)

    def base(self, name: str) -> str:
        if self.recipe.bases is None:
            return self.config.model.name_or_path
        return str(self.folder(name) / "made" / "model")

    def folder(self, name: str, seed: int | None = None) -> Path:
        """Of a base or of a model: its name in letters that every file system takes."""
        plain = folder_name(name)
        return self.out / "bases" / plain if seed is None else self.out / "models" / plain / f"seed-{seed}"

    def here(self, base: str) -> Tree:
        """What a job finds where, on this machine."""
        return {
            "base": self.base(base), "data": self.data, "eval": self.held_out, "parts": str(self.parts),
            "problems": dict(self.problems), "comparison": dict(self.comparison),
            "asked": str(self.folder(base) / "asked"), "judge_jobs": self.judge_jobs,
        }  # fmt: skip

    def asked(self) -> Tree:
        """What every base and model is asked."""
        recipe, scoring = self.recipe, self.recipe.memorization
        return {
            "suites": {name: suite.model_dump(mode="json") for name, suite in recipe.suites.items()},
            "scoring": {
                "text": scoring.text, "k": scoring.k, "batch_tokens": scoring.batch_tokens,
                "max_length": self.config.data.max_length,
            },
            "taught": scoring.taught,
            "geometry": recipe.geometry.model_dump(mode="json"),
        }  # fmt: skip


def gather(recipe: Recipe, out: Path, *, judge_jobs: int) -> Place:
    """The data, where it is: bundled rows are copied into the reproduction's folder.

    Raises:
        ConfigError: settings that training would refuse. DataError: a file cannot be read or written.
    """
    from ibft.tiny import task_file

    config, _ = load_config(None, overrides_of(recipe.train))
    folder = out / "data"

    def bundled(split: str, limit: int | None = None) -> str:
        path = folder / (f"{split}.jsonl" if limit is None else f"{split}-{limit}.jsonl")
        lines = task_file(split).read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines[:limit]), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        return str(path)

    data, held_out = config.data.path, config.data.eval_path
    if data == BUNDLED:
        data, held_out = bundled("train", recipe.max_rows), bundled("validation")
    problems = {
        name: bundled("test", suite.max_problems) if suite.problems == BUNDLED else suite.problems
        for name, suite in recipe.suites.items()
    }
    comparison = {
        name: bundled("test", recipe.max_rows) if path == BUNDLED else path
        for name, path in recipe.memorization.comparison.items()
    }
    return Place(recipe, out, config, data, held_out, problems, comparison, judge_jobs)


def hash_files(recipe: Recipe) -> dict[str, str | None]:
    """sha256 of each file that a recipe names: what the results hang on beside its settings. None of a hub id."""
    from ibft.tiny import task_file

    data = load_config(None, overrides_of(recipe.train))[0].data
    named = {
        "data.path": (data.path, "train"), "data.eval_path": (data.eval_path, "validation"),
        **{f"suites.{name}": (suite.problems, "test") for name, suite in recipe.suites.items()},
        **{f"comparison.{name}": (path, "test") for name, path in recipe.memorization.comparison.items()},
    }  # fmt: skip
    return {key: hash_file(str(task_file(split)) if path == BUNDLED else path) for key, (path, split) in named.items()}


def check(recipe: Recipe) -> None:
    """What would else be found missing after hours of training; nothing is written.

    Raises:
        DataError, SetupError, ConfigError: problems or comparison rows that cannot be read, no sandbox, no simulator,
            no matplotlib.
    """
    from ibft.data.sources import load_rows
    from ibft.evaluation.judge import make_judge
    from ibft.evaluation.score_plots import need_matplotlib
    from ibft.evaluation.suites import load_problems, suite_of
    from ibft.tiny import task_file

    need_matplotlib("the figures")
    for suite in recipe.suites.values():
        path = str(task_file("test")) if suite.problems == BUNDLED else suite.problems
        load_problems(suite_of(suite.suite), path)
        make_judge(suite_of(suite.suite), suite.rule)
    for path in recipe.memorization.comparison.values():
        if path != BUNDLED:
            load_rows(path)
