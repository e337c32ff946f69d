"""What every experiment needs on disk, and the settings that make a job small and its waits short."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.config.schema import RpcConfig

_TESTS = Path(__file__).parents[2] / "tests"
_NUM_CHATS = 400
_WORDS = "the sea is deep and blue there are fish in it what comes after the capital of France is Paris tell me something".split()

# Seconds. A peer that is silent for HEARTBEAT x MISSES is given up; a stopped trainer's lease can lapse.
HEARTBEAT, MISSES, LEASE = 0.5, 3, 4.0
REQUEST_TIMEOUT, RECONNECT_DEADLINE, DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT = 20.0, 60.0, 10.0, 20.0
MAX_REQUEST_BYTES, MAX_PICKLE_BYTES = 2**20, 2**19
CHECKPOINT_EVERY, VALIDATE_EVERY, ACCUMULATION = 25, 100, 4

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Workplace:
    """A directory with a model, chats, and room for logs, runs and temporary files."""

    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def temporary(self) -> Path:
        """TMPDIR of all workers."""
        return self.path / "tmp"

    @property
    def chats(self) -> Path:
        return self.path / "chats.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "TMPDIR": str(self.temporary)}

    def run_dir(self, name: str) -> Path:
        return self.path / "runs" / name

    def prepare(self) -> "Workplace":
        for directory in (self.logs, self.temporary):
            directory.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)

        def words(fewest: int, most: int) -> str:
            return " ".join(draw.choices(_WORDS, k=draw.randint(fewest, most)))

        with self.chats.open("w") as file:
            for _ in range(_NUM_CHATS):
                turns = [
                    {"role": "user", "content": words(3, 8)},
                    {"role": "assistant", "content": words(6, 20)},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
        return self

    def service_settings(self, port: int) -> list[str]:
        """Of every job of one service."""
        return [
            *self.job_settings(),
            f"rpc.registry=127.0.0.1:{port}",
            f"rpc.token_file={self.token}",
            f"rpc.heartbeat_interval={HEARTBEAT}",
            f"rpc.heartbeat_misses={MISSES}",
            f"rpc.request_timeout={REQUEST_TIMEOUT}",
            f"rpc.reconnect_deadline={RECONNECT_DEADLINE}",
        ]

    def job_settings(self) -> list[str]:
        """Of every job."""
        return [
            "target=hf",
            f"target.model={self.model}",
            "target.dtype=float32",
            "target.device=cpu",
            f"target.session_lease={LEASE}",
            f"rpc.drain_timeout={DRAIN_TIMEOUT}",
            f"rpc.shutdown_timeout={SHUTDOWN_TIMEOUT}",
            f"rpc.max_request_bytes={MAX_REQUEST_BYTES}",
            f"rpc.max_pickle_bytes={MAX_PICKLE_BYTES}",
            "run.threads=1",
        ]

    def training_settings(self, *, steps: int, seed: int) -> list[str]:
        """Of `job=train`."""
        return [
            "data=chats",
            f"data.train_path={self.chats}",
            "data.max_length=128",
            "draft.vocab_size=64",
            "draft.ttt_steps=3",
            "train.device=cpu",
            "train.autocast=null",
            "train.batch_size=2",
            f"train.accumulation={ACCUMULATION}",
            f"train.max_steps={steps}",
            "train.log_every=1",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            f"train.validate_every={VALIDATE_EVERY}",
            "train.validation_batches=2",
            f"run.seed={seed}",
        ]

    def rpc_config(self, port: int) -> RpcConfig:
        """The same as `service_settings`, for programs of the lab."""
        return RpcConfig(
            registry=f"127.0.0.1:{port}",
            token_file=str(self.token),
            heartbeat_interval=HEARTBEAT,
            heartbeat_misses=MISSES,
            request_timeout=REQUEST_TIMEOUT,
            reconnect_deadline=RECONNECT_DEADLINE,
            shutdown_timeout=SHUTDOWN_TIMEOUT,
        )


def make_model() -> None:
    """Entry of a worker of the zygote: makes the model directory that `sys.argv` names."""
    sys.path.insert(0, str(_TESTS))
    from support.tiny_model import save_tiny_model

    save_tiny_model(Path(sys.argv[1]))
