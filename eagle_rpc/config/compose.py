"""From YAML to checked dataclasses: the only place that knows OmegaConf and Hydra's store."""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle_rpc.config.checks import check
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


def register_schema() -> None:
    """Makes the dataclasses known to Hydra, which then refuses unknown keys and wrong types."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Plain dataclasses, checked. Raises `ConfigError` naming field, rule and value."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'configuration'} is not usable: {error.msg or error}".split("\n")[0]
        ) from None
    assert isinstance(config, Config)
    check(config)
    return config


def write_config(config: Config, path: Path) -> None:
    """The resolved configuration as YAML. `python -m eagle_rpc --config-path DIR --config-name NAME` runs it again (DIR absolute)."""
    resolved = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    content = {"defaults": _DEFAULTS, **resolved, "hydra": _QUIET_HYDRA}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
