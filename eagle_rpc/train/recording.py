"""The bits of a training: recorded while it runs, and compared with those of another one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch, TokenBatch, tensors_digest

QUANTITIES = ("supervision", "loss", "grad_norm", "weights")
_TENSORS = (
    "input_ids",
    "loss_mask",
    "aux_hidden_states",
    "supervised_rows",
    "target_probs",
    "position_mask",
    "log_normalizer",
    "argmax",
)


class RecordingBackend:
    """A target backend that keeps a digest of each supervision tensor of its stream."""

    def __init__(self, backend: Eagle3TargetBackend) -> None:
        self._backend = backend
        self.digests: list[dict[str, str]] = []  # of each batch, by tensor
        self.rows: list[int] = []  # of each batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        for batch in self._backend.stream(batches):
            self.digests.append({name: tensors_digest([(name, getattr(batch, name))]) for name in _TENSORS})
            self.rows.append(batch.supervised_rows.numel())
            yield batch


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two trainings of one encoding in one topology."""

    topology: str
    encoding: str
    tensors: int  # supervision tensors of all trainers and steps
    rows: int  # rows in them; without rows, equality proves nothing
    equal: dict[str, bool]  # whether each of `QUANTITIES` is bitwise equal

    @property
    def passed(self) -> bool:
        return self.rows > 0 and all(self.equal.values())


def compare_records(
    topology: str, encoding: str, left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]
) -> Comparison:
    """Compares two trainings by their records, one of each trainer: `QUANTITIES`, and `rows`."""
    equal = {
        name: [record[name] for record in left] == [record[name] for record in right] for name in QUANTITIES
    }
    tensors = sum(len(batch) for record in right for batch in record["supervision"])
    rows = sum(record["rows"] for record in right)
    return Comparison(topology, encoding, tensors, rows, equal)
