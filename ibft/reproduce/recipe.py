"""A reproduction's recipe: what is trained, from what, and what is asked of it. Shipped, in ibft/recipes:

tiny           the bundled base and tasks, a base made for it that has memorised a quarter of the rows; two CPU cores
tiny-quick     the same pipeline with little of everything
tiny-variants  the same bases, other bottlenecks
origen         the paper's OriGen (Verilog) runs at full size, one GPU
evol           the paper's Evol-CodeAlpaca (Python) runs, the same
gsm8k          mathematics, and
text           plain text: to copy and change
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ibft.config import Config, NonNegative, PositiveInt, Section
from ibft.errors import ConfigError
from ibft.load_config import load_config, read_yaml

RECIPES = ("tiny", "tiny-quick", "tiny-variants", "origen", "evol", "gsm8k", "text")
Tree = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
OURS = ("data", "fine-tuning data", "memorised", "rest")  # names of the fine-tuning rows in a report


class TinyBases(Section):
    """Bases made from the bundled one (`ibft.tiny.memorise`): `base` has memorised rows, the twin has read as
    many others, each once, and the perturbed one is `base` with noise on its weights."""

    memorised_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the train rows that are told to the base."""
    reading_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of those rows (the twin: of others) among the documents that a base goes on reading; the rest are the
    corpus's."""
    steps: PositiveInt = 100
    """Of 2,048 tokens."""
    learning_rate: NonNegative = 1e-3
    noise: NonNegative = 0.4
    """Of the perturbed base: standard deviation over a matrix's root mean square."""
    seed: Annotated[int, Field(ge=0)] = 0


class ModelRecipe(Section):
    """One fine-tuning, of every seed."""

    name: str
    what: str
    base: str = "base"
    changes: Tree = Field(default_factory=dict)
    """Of the recipe's `train` settings, as section.key: value."""
    drop: Literal["most_memorised", "random"] | None = None
    """Leave out the most memorised rows (`memorization.share` percent of them), or as many random ones."""


class SuiteRecipe(Section):
    suite: str
    problems: str | None = None
    """File or hub id; default the suite's own."""
    descriptions: str | None = None
    n: PositiveInt = 10
    """Samples a problem."""
    temperature: NonNegative = 0.6
    more_temperatures: tuple[NonNegative, ...] = ()
    """Of the base and of the scored models."""
    prompt_style: str = "auto"
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 16
    rule: Literal["strict", "official"] = "strict"
    max_problems: PositiveInt | None = None
    """Only the first, of a file."""


class MemorizationRecipe(Section):
    text: Literal["response", "whole"] = "whole"
    """Tokens of Min-K%."""
    taught: Literal["response", "whole"] = "response"
    """Tokens of the deciles' cross-entropy; plain texts are taught whole."""
    k: Annotated[float, Field(gt=0, le=100)] = 20
    share: Annotated[float, Field(gt=0, le=50)] = 10
    """Percent of the rows: most memorised, least memorised, random."""
    batch_tokens: PositiveInt = 8192
    comparison: dict[str, str] = Field(default_factory=dict)
    """Name -> rows that are known to be little memorised: file or hub id."""


class GeometryRecipe(Section):
    layers: str = "auto"
    pool: Literal["mean", "last"] = "mean"


class Recipe(Section):
    name: str
    what: str
    measured: str | None = None
    """How long it took, and where."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    train: Tree
    """Settings of `ibft-fast train` that all models share, as section.key: value."""
    max_rows: PositiveInt | None = None
    """Only the first of the bundled rows, of training and comparison."""
    bases: TinyBases | None = None
    """None: model.name_or_path of `train` is the one base."""
    models: Annotated[tuple[ModelRecipe, ...], Field(min_length=1)]
    suites: dict[str, SuiteRecipe]
    """By name; none: nothing is sampled."""
    memorization: MemorizationRecipe = MemorizationRecipe()
    geometry: GeometryRecipe = GeometryRecipe()
    scored: tuple[str, ...] = ("FT", "IB-FT")
    """Models whose rows are scored: Min-K% after training, and the cross-entropy of each decile over it."""
    score_steps: PositiveInt = 20
    """That every so many steps, and at the end."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [model.name for model in self.models]
        if doubles := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"models: {doubles.pop()} is there twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {', '.join(map(str, self.seeds))}, one of them twice")
        bases = BASES if self.bases else ("base",)
        for model in self.models:
            if model.base not in bases:
                raise ValueError(f"models: {model.name} starts from {model.base!r}, expected {' or '.join(bases)}")
            if model.name in bases:
                raise ValueError(f"models: {model.name} is the name of a base")
        if len({folder_name(name) for name in names}) < len(names):
            raise ValueError("models: two names differ in nothing but what a folder's name cannot hold")
        if taken := set(self.memorization.comparison) & set(OURS):
            raise ValueError(f"memorization.comparison: {taken.pop()!r} is the name of the fine-tuning rows")
        if unknown := set(self.scored) - set(names):
            raise ValueError(f"scored: no model is named {unknown.pop()!r}")
        return self


BASES = ("base", "twin base", "perturbed base")


def folder_name(name: str) -> str:
    """In letters and digits that every file system takes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """A shipped one or a file, changed by key=value: a key of the recipe (`bases.steps`), or else one of `ibft-fast
    train`.

    Raises:
        ConfigError: no such recipe, an unknown key, a value out of range; settings that training would refuse.
    """
    tree: Tree
    if name in RECIPES:
        tree = yaml.safe_load(files("ibft").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8"))
    elif Path(name).suffix in (".yaml", ".yml"):
        tree = read_yaml(Path(name))
    else:
        raise ConfigError(f"got {name!r}, expected a recipe file (.yaml) or one of {', '.join(RECIPES)}")
    for override in overrides:
        key, value = parsed(override)
        *parents, last = (
            key.split(".") if key.split(".")[0] in Recipe.model_fields and not is_training(key) else ("train", key)
        )
        into = tree
        for part in parents:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise ConfigError(f"{key}: {part} has no keys of its own")
        into[last] = value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {reason}" if where else reason) from error
    shared, _ = load_config(None, overrides_of(recipe.train))
    for model in recipe.models:  # each is refused before the first is trained
        config, _ = load_config(None, overrides_of({**recipe.train, **model.changes}))
        check_asked_as_trained(model.name, config, shared)
    return recipe


NOT_HANDED_ON = ("model.revision", "data.split", "data.keep_ids", "data.drop_ids", "data.max_samples")
SHARED = ("model.name_or_path", "model.quantization", "data.path", "data.eval_path", "data.max_length")


def check_asked_as_trained(name: str, config: Config, shared: Config) -> None:
    """Raises ConfigError for what training would obey and the questions to bases and models would not."""
    for keys, others, why in (
        (NOT_HANDED_ON, Config(), "a reproduction asks of all rows of the data's train split, and of no revision"),
        (SHARED, shared, "all models of a reproduction share it"),
    ):
        for key in keys:
            section, field = key.split(".")
            value, expected = (getattr(getattr(each, section), field) for each in (config, others))
            if value != expected:
                raise ConfigError(f"{name}: {key}: got {value!r}, expected {expected!r}: {why}")


def is_training(key: str) -> bool:
    """`train` names a section of training's settings too."""
    return key.startswith("train.")


def parsed(override: str) -> tuple[str, Any]:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"got {override!r}, expected key=value")
    try:
        return key.strip(), yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{override}: {value!r} is no value: {getattr(error, 'problem', None) or error}") from error


def overrides_of(settings: Tree) -> list[str]:
    """section.key=value of each; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
