"""The runs that `--multirun` asks for: every combination of swept values, composed and checked at once.

Sweeps are written in Hydra's own grammar (`a.b=1,2`, `a.b=range(1,4)`, `group=choice(x,y)`), which its parser
reads. Text with a comma therefore needs quotes here.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from eagle_rpc.config.checks import as_message, check
from eagle_rpc.config.choices import JobName, PromptSource
from eagle_rpc.config.compose import compose_settings, conf_dir, to_config, with_settings
from eagle_rpc.config.launch import jobs
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConfigError

FLAGS = ("--multirun", "-m")
# They name the sweep, or are each run's own.
_NOT_SWEPT = ("job", "job.name", "run.name", "run.dir", "serving.dir")
# Jobs that do not end by themselves.
_ENDLESS = (JobName.serve, JobName.registry, JobName.status)
# Settings of the target without influence on the text of its answers; `regenerate.dtype` replaces its format.
_NOT_IN_ANSWERS = re.compile(
    r"dtype|device|aux_layer_ids|compile_\w+|chunk_rows|fused_\w+|session_lease|max_(?!length)\w+"
)
_DATA_IN_ANSWERS = ("chat_template", "template_arguments", "date", "on_error", "prompt_source")
# Longer names of directories are cut, and get a hash.
_LONGEST_NAME = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One combination of values."""

    name: str
    """Readable: the swept settings with their values. The name of the run's directory."""
    values: Mapping[str, str]
    """The swept settings as on the command line."""
    overrides: Sequence[str]
    """The command line of its jobs, without `job=`."""
    config: Config
    jobs: Sequence[JobName]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs of a command line, in the order of its values."""

    directory: Path
    runs: Sequence[SweptRun]


@dataclass(frozen=True, slots=True)
class _Combination:
    values: dict[str, str]
    overrides: list[str]


def is_sweep(words: Sequence[str]) -> bool:
    """Whether a command line asks for several runs."""
    return any(flag in words for flag in FLAGS)


def read_sweep(words: Sequence[str]) -> Sweep:
    """The sweep of a command line. Without `job=` each run is the whole path.

    The runs lie in the `run.dir` of the command line. They share its prompts, and its answers where the settings
    that make answers are equal. Raises one `ConfigError` with the mistakes of all combinations.
    """
    combinations = list(_combinations([word for word in words if word not in FLAGS]))
    names = _names([one.values for one in combinations])

    def compose(number: int) -> tuple[DictConfig, Config]:
        words = combinations[number].overrides
        composed = compose_settings(*words)
        return composed, _checked(composed, words)[0]

    composed = _each(names, compose)
    directory = Path(composed[0][1].run.dir)
    answers = _answer_files([config for _, config in composed], names)

    def give_place(number: int) -> SweptRun:
        """What Hydra composed stays as it is, with the run's own files: composing again would give the same."""
        one, name, (settings, config) = combinations[number], names[number], composed[number]
        own = {
            "regenerate.prompts": config.regenerate.prompts,
            "evaluate.prompts": config.evaluate.prompts,
            "regenerate.output": answers[number],
            "run.dir": str(directory / name),
            "run.name": f"{config.run.name}/{name}"[-128:],
            "train.resume": "auto",
        }
        words = [*one.overrides, *(f"{path}={value}" for path, value in own.items())]
        config, its_jobs = _checked(with_settings(settings, own), words)
        overrides = [word for word in words if not word.startswith("job=")]
        return SweptRun(name=name, values=one.values, overrides=overrides, config=config, jobs=its_jobs)

    runs = _each(names, give_place)
    _check_together(runs)
    return Sweep(directory, runs)


def _combinations(typed: list[str]) -> Iterator[_Combination]:
    """Every combination of the values of swept overrides, in the order in which they were typed."""
    if flags := [word for word in typed if word.startswith("-")]:
        raise ConfigError(f"--multirun must go with overrides alone, got {flags[0]}")
    swept = {number: override for number, word in enumerate(typed) if (override := _sweep_in(word))}
    keys = [override.get_key_element() for override in swept.values()]
    for key in keys:
        name = key.lstrip("+")
        if name in _NOT_SWEPT:
            raise ConfigError(f"{name} must have one value with --multirun, got several")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ConfigError(f"{twice[0]} must be swept once, got it {keys.count(twice[0])} times")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        # Patterns, as in target=glob(*), are looked up among the files of conf/.
        options = [list(override.sweep_string_iterator()) for override in swept.values()]
    for values in product(*options):
        overrides = list(typed)
        for number, key, value in zip(swept, keys, values, strict=True):
            overrides[number] = f"{key}={value}"
        shown = {key.lstrip("+"): value.strip("'\"") for key, value in zip(keys, values, strict=True)}
        yield _Combination(shown, overrides)


def _sweep_in(word: str) -> Override | None:
    """The sweep in an override; None for one value. Raises `ConfigError` for a sweep without end."""
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            # Of several overrides at once it tells where patterns are looked up.
            (override,) = parser.parse_overrides([word])
    except HydraException:
        # One value: text that is no word of the grammar, or a mistake, which composing names.
        return None
    if not override.is_sweep_override():
        return None
    if not override.is_discrete_sweep():
        raise ConfigError(f"--multirun must have single values, choices or ranges, got {word}")
    return override


def _names(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each run: its swept fields and values. Raises `ConfigError` if two runs are the same."""
    fields = Counter(key.rpartition(".")[2] for key in runs[0])
    names = []
    for values in runs:
        parts = []
        for key, value in values.items():
            field = key.rpartition(".")[2]
            parts.append(f"{field if fields[field] == 1 else key}={value}")
        name = "__".join(re.sub(r"[^\w.+=-]+", "-", part).strip("-") for part in parts) or "run"
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        names.append(name)
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"--multirun must name every combination once, got {name} {count} times")
    return names


def _checked(composed: DictConfig, overrides: Sequence[str]) -> tuple[Config, list[JobName]]:
    """The configuration of a run and its jobs, for all of which it is checked. Raises `ConfigError`."""
    config = to_config(composed)
    its_jobs = jobs(config, list(overrides))
    for job in its_jobs:
        check(replace(config, job=replace(config.job, name=job)))
    return config, its_jobs


def _each(names: Sequence[str], make: Callable[[int], T]) -> list[T]:
    """Makes something for each run, by its number. Raises `ConfigError` with the mistakes of all runs."""
    made: list[T] = []
    mistakes: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        try:
            made.append(make(number))
        except ConfigError as error:
            mistakes.setdefault(str(error), []).append(name)
    if mistakes:
        texts = [
            text if len(runs) == len(names) else f"{', '.join(runs)}: {text}"
            for text, runs in mistakes.items()
        ]
        raise ConfigError(as_message(texts, "in the sweep"))
    return made


def _answer_files(configs: Sequence[Config], names: Sequence[str]) -> list[str]:
    """The file of answers of each run: one for all runs whose answers depend on equal settings."""
    keys = [_made_answers(config) for config in configs]
    kinds_in = Counter(config.regenerate.output for config in dict(zip(keys, configs, strict=True)).values())
    files: dict[str, str] = {}
    for key, config, name in zip(keys, configs, names, strict=True):
        path = Path(config.regenerate.output)
        # Of several kinds of answers, each has the name of the first run that reads them.
        own = path.with_name(f"{path.stem}_{name}{path.suffix}")
        files.setdefault(key, str(own if kinds_in[config.regenerate.output] > 1 else path))
    return [files[key] for key in keys]


def _made_answers(config: Config) -> str:
    """All settings that the target's answers depend on, as text."""
    data = {name: getattr(config.data, name) for name in _DATA_IN_ANSWERS}
    seed = config.run.seed if config.regenerate.temperature > 0 else None
    return _as_text([_target_in_answers(config), data, asdict(config.regenerate), seed])


def _target_in_answers(config: Config) -> dict[str, Any]:
    target = asdict(config.target)
    return {name: value for name, value in target.items() if not _NOT_IN_ANSWERS.fullmatch(name)}


def _as_text(settings: Any) -> str:
    return json.dumps(settings, default=lambda choice: choice.name, sort_keys=True)


def _check_together(runs: Sequence[SweptRun]) -> None:
    """Rules between the runs of a sweep. Raises `ConfigError`."""
    first = runs[0].config
    if first.job.name in _ENDLESS:
        raise ConfigError(f"--multirun must go with a job that ends, got job={first.job.name.name}")
    exports = Counter(run.config.serving.dir for run in runs)
    if JobName.export in runs[0].jobs and len(exports) < len(runs):
        raise ConfigError(
            f"serving.dir must be each run's own with --multirun, got {first.serving.dir} for several"
        )
    if first.data.prompt_source is not PromptSource.self:
        return
    made_prompts = {_as_text([_target_in_answers(run.config), asdict(run.config.prompts)]) for run in runs}
    if len(made_prompts) > 1:
        raise ConfigError(
            "prompts must be made with one set of settings for all runs with data.prompt_source=self, "
            "got several values of prompts.* or target.*: they need a sweep each"
        )
