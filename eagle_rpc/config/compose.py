"""From YAML and overrides to checked dataclasses: the only place that knows OmegaConf and Hydra's store."""

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle_rpc.config.checks import check
from eagle_rpc.config.native import native_dtype
from eagle_rpc.config.overrides import explain, for_hydra
from eagle_rpc.config.rules import settings_of
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
# As in conf/config.yaml: Hydra neither changes the directory nor writes or logs anything.
_DEFAULTS = [
    "schema",
    {"override hydra/job_logging": "none"},
    {"override hydra/hydra_logging": "none"},
    "_self_",
]
_QUIET_HYDRA = {"output_subdir": None, "run": {"dir": "."}, "job": {"chdir": False}}


def conf_dir() -> Path:
    """`conf/` of a checkout, or the copy inside an installed wheel."""
    checkout = _PACKAGE.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else _PACKAGE / "conf"


@functools.cache
def register_schema() -> None:
    """Makes the dataclasses known to Hydra, once: it then refuses unknown keys and wrong types.

    `${native_dtype:}` in `conf/` is the number format that this machine computes fast.
    """
    OmegaConf.register_new_resolver("native_dtype", native_dtype, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def load(*overrides: str, directory: Path | None = None, name: str = "config") -> Config:
    """Composes `name` of `directory` (default: `conf/`) with Hydra `overrides` and checks it.

    Raises `ConfigError` that names every unknown setting, or else every rule that does not hold.
    """
    return to_config(compose_settings(*overrides, directory=directory, name=name))


def compose_settings(*overrides: str, directory: Path | None = None, name: str = "config") -> DictConfig:
    """What `load` composes, before its check. Raises `ConfigError` for unknown settings and wrong types."""
    register_schema()
    try:
        with initialize_config_dir(str(directory or conf_dir()), version_base="1.3"):
            return compose(name, [for_hydra(override) for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise refusal(error, overrides) from None


def with_settings(composed: DictConfig, values: Mapping[str, str]) -> DictConfig:
    """A copy of `composed` with these `values` by `SECTION.FIELD`; settings derived from them follow."""
    changed = copy.deepcopy(composed)
    for path, value in values.items():
        OmegaConf.update(changed, path, value)
    return changed


def from_sections(**sections: Any) -> Config:
    """The checked configuration of these sections (dataclasses), with defaults for the others.

    Choices may be given by name. Raises `ConfigError` as `to_config`.
    """
    values = {name: asdict(section) for name, section in sections.items()}
    try:
        composed = OmegaConf.merge(OmegaConf.structured(Config), values)
    except OmegaConfBaseException as error:
        raise refusal(error, ()) from None
    assert isinstance(composed, DictConfig)
    return to_config(composed)


def refusal(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's `error` about `overrides` in the project's words."""
    return ConfigError(explain(error, overrides, conf_dir()))


def to_config(composed: DictConfig) -> Config:
    """Plain dataclasses, checked. Raises `ConfigError` with field, rule and value of every mistake."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        for path in missing:
            OmegaConf.update(composed, path, "")
        config = OmegaConf.to_object(composed)
    # AttributeError: a setting that the schema lacks, added by +NAME=VALUE.
    except (OmegaConfBaseException, AttributeError) as error:
        raise refusal(error, ()) from None
    assert isinstance(config, Config)
    check(config, missing)
    _expand_home(config)
    return config


def _expand_home(config: Config) -> None:
    """Replaces `~` at the start of every path by the home directory."""
    for setting in settings_of(config):
        if setting.is_path:
            name = setting.path.rpartition(".")[2]
            setattr(setting.owner, name, os.path.expanduser(setting.value))


def write_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML.

    `python -m eagle_rpc --config-path DIR --config-name NAME` with an absolute DIR runs it again.
    """
    resolved = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(resolved, dict)
    content = {"defaults": _DEFAULTS, **resolved, "hydra": _QUIET_HYDRA}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
