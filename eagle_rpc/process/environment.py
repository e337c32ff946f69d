"""The only file that reads or writes the process environment."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.errors import ConfigError

_OF_TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those that torchrun started. The defaults describe a process started by hand."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # workers of this torchrun agent
    role_name: str = "default"  # torchrun's own default, without --role
    role_rank: int = 0
    role_size: int = 1
    num_agents: int = 1
    restart_count: int = 0
    max_restarts: int = 0
    run_id: str = "local"
    master_addr: str | None = None  # None: not started by torchrun
    master_port: int = 0
    agent_hosts_store: bool = False  # otherwise rank 0 hosts torchrun's store

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return self.master_addr is not None


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world of torchrun's variables. Raises `ConfigError` if only some of them are set."""
    if "RANK" not in environ:
        return World()
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
        found = f"RANK is set but {missing.args[0]} is not"
        raise ConfigError(f"{found}: start the workers with torchrun") from None


def error_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file in which torchrun expects the reason of this worker's failure; None without torchrun."""
    name = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(name) if name else None


def outside_torchrun(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` without torchrun's variables, for a child that is no worker of the same torchrun."""
    return {name: value for name, value in environ.items() if not _OF_TORCHRUN.fullmatch(name)}


def speaks_for_host(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first worker on its host, also if torchrun's other variables are missing."""
    return environ.get("LOCAL_RANK", "0") == "0"


def prepare_environment() -> None:
    """Sets variables that torch reads at its import; call it before that. Values of the user stay.

    Large pages make receives above 32 MB two to three times faster. Threads of tokenizers must not survive a
    fork. torch logs every peer that leaves; this package reports the relevant ones itself, under the worker's
    name. Where other processes use the cores, OpenMP's threads wait for each other in a loop that takes the time
    of those they wait for: on two busy cores answers came ten times as slowly. They then sleep as soon as libgomp
    lets them where it knows of more threads than cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def keep_compiled_code(directory: str | Path) -> None:
    """Makes `torch.compile` keep its code in `directory`, unless the user's environment names a place.

    torch has no other setting for this, and its compiler processes inherit the variable.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(directory).absolute()))


def prepare_vllm(*, in_this_process: bool) -> None:
    """Sets what vLLM reads from the environment alone; call it before vLLM is imported. Values of the user stay,
    except of what decides where its engine runs.

    In this process the engine hands tensors over without copies. Its processes start afresh, as a fork would
    copy the locks of RPC's threads, and leave the choice of cores to the number of threads.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_this_process else "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def without_torchrun() -> Iterator[None]:
    """Hides torchrun's variables from what the body starts: its process groups would look for torchrun's store."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _OF_TORCHRUN.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def bind_to_interface(interface: str) -> None:
    """Makes TensorPipe, gloo and NCCL of this process listen on one interface; call it before they start."""
    os.environ["TP_SOCKET_IFNAME"] = interface
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # Without "=" NCCL reads a name as a prefix and excludes the loopback.
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
