"""From YAML to checked dataclasses: the only place that knows OmegaConf and Hydra's store."""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle_rpc.config.checks import check
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]


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
        raise ConfigError(f"{error.full_key or 'configuration'} is not usable: {error.msg or error}".split("\n")[0]) from None
    assert isinstance(config, Config)
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as `config.yaml` keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
