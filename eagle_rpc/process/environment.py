"""The one place that reads and writes the process environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What torchrun says of this process; a process started by hand is a world of one."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # workers of this agent
    role_name: str  # "default" unless torchrun was given --role
    role_rank: int
    role_size: int
    num_agents: int
    restart_count: int
    max_restarts: int
    run_id: str
    master_addr: str | None  # null: nobody else is there
    master_port: int
    agent_hosts_store: bool  # otherwise rank 0 has to

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return self.master_addr is not None


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Raises `ConfigError` if torchrun's variables are incomplete."""
    if "RANK" not in environ:
        return World(
            rank=0,
            size=1,
            local_rank=0,
            local_size=1,
            role_name="default",
            role_rank=0,
            role_size=1,
            num_agents=1,
            restart_count=0,
            max_restarts=0,
            run_id="local",
            master_addr=None,
            master_port=0,
            agent_hosts_store=False,
        )
    try:
        return World(
            rank=int(environ["RANK"]),
            size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            local_size=int(environ["LOCAL_WORLD_SIZE"]),
            role_name=environ["ROLE_NAME"],
            role_rank=int(environ["ROLE_RANK"]),
            role_size=int(environ["ROLE_WORLD_SIZE"]),
            num_agents=int(environ["GROUP_WORLD_SIZE"]),
            restart_count=int(environ["TORCHELASTIC_RESTART_COUNT"]),
            max_restarts=int(environ["TORCHELASTIC_MAX_RESTARTS"]),
            run_id=environ["TORCHELASTIC_RUN_ID"],
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
            agent_hosts_store=environ["TORCHELASTIC_USE_AGENT_STORE"] == "True",
        )
    except KeyError as missing:
        raise ConfigError(
            f"RANK is set but {missing.args[0]} is not: start the workers with torchrun"
        ) from None


def prepare_environment() -> None:
    """Settings that torch reads when it is imported; call before that.

    Large pages make receives above 32 MB two to three times faster; tokenizers' threads must not outlive a fork. torch's own
    lines about every peer that leaves are left out: what matters of them is reported here, under the worker's name.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def keep_compiled_code(directory: str | Path) -> None:
    """Where `torch.compile` keeps its code between runs, unless the user's environment names another place.

    torch has no other setting for it, and its compiling processes inherit this one.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(directory).absolute()))


def bind_to_interface(interface: str) -> None:
    """Makes TensorPipe, gloo and NCCL of this process listen on one interface; call before any of them starts."""
    os.environ["TP_SOCKET_IFNAME"] = interface
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # NCCL takes names as prefixes, and leaves the loopback out, unless told that they are exact.
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
