"""The files of a fault test, and the settings that make its jobs small and its waits short."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from support.tiny_model import save_tiny_model

_NUM_CHATS = 400
_WORDS = (
    "the sea is deep and blue there are fish in it what comes after the capital of France is Paris "
    "tell me something"
).split()

# Seconds. A silent peer is given up after HEARTBEAT x MISSES; a stopped trainer's lease can expire.
HEARTBEAT, MISSES, LEASE = 0.5, 3, 4.0
REQUEST_TIMEOUT, RECONNECT_DEADLINE, DRAIN_TIMEOUT, SHUTDOWN_TIMEOUT = 20.0, 60.0, 10.0, 20.0
MAX_REQUEST_BYTES, MAX_PICKLE_BYTES = 2**20, 2**19
BATCH_SIZE, ACCUMULATION, VALIDATION_BATCHES = 2, 4, 2
SEQUENCES_PER_STEP = BATCH_SIZE * ACCUMULATION

_TARGET = (
    f"target=hf target.dtype=float32 target.device=cpu target.session_lease={LEASE} run.threads=1".split()
)
_RPC = (
    f"rpc.drain_timeout={DRAIN_TIMEOUT} rpc.shutdown_timeout={SHUTDOWN_TIMEOUT} "
    f"rpc.max_request_bytes={MAX_REQUEST_BYTES} rpc.max_pickle_bytes={MAX_PICKLE_BYTES} "
    f"rpc.heartbeat_interval={HEARTBEAT} rpc.heartbeat_misses={MISSES} "
    f"rpc.request_timeout={REQUEST_TIMEOUT} rpc.reconnect_deadline={RECONNECT_DEADLINE}"
).split()
_TRAINING = (
    "data=chats data.max_length=128 draft.vocab_size=64 draft.ttt_steps=3 "
    f"train.device=cpu train.autocast=null train.batch_size={BATCH_SIZE} train.accumulation={ACCUMULATION} "
    "train.log_every=1 train.checkpoint_every=25 train.validate_every=100 "
    f"train.validation_batches={VALIDATION_BATCHES}"
).split()


@dataclass(frozen=True)
class Workspace:
    """A directory with a model, chats, logs, runs and temporary files."""

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
        return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.temporary)}

    def run_dir(self, name: str) -> Path:
        return self.path / "runs" / name

    def prepare(self) -> "Workspace":
        """Makes the directories and the chats; `make_model` makes the model."""
        for directory in (self.logs, self.temporary):
            directory.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)

        def turn(role: str, fewest: int, most: int) -> dict[str, str]:
            return {"role": role, "content": " ".join(draw.choices(_WORDS, k=draw.randint(fewest, most)))}

        chats = ([turn("user", 3, 8), turn("assistant", 6, 20)] for _ in range(_NUM_CHATS))
        self.chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
        return self

    def service_settings(self, registry: str) -> list[str]:
        """Overrides of every job of the service whose registry has this address."""
        where = [
            f"target.model={self.model}",
            f"rpc.registry={registry}",
            f"rpc.token_file={self.token}",
        ]
        return [*_TARGET, *_RPC, *where]

    def training_settings(self, *, steps: int, seed: int) -> list[str]:
        """Overrides of `job=train` beside those of the service."""
        return [*_TRAINING, f"data.train_path={self.chats}", f"train.max_steps={steps}", f"run.seed={seed}"]


def make_model() -> None:
    """Entry of a worker of the zygote: makes the model directory that `sys.argv` names."""
    save_tiny_model(Path(sys.argv[1]))
