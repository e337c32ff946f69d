"""Trainers that work on one draft: sums over all of them, and the check that they are alike.

**Supervision before collectives.** What RPC receives on a GPU may have to wait behind a collective that runs there, and a
collective waits for the slowest trainer. Neither waits for ever, because no trainer waits for a target between the start
of a collective and the moment from which all others can start it too without a target's help. So all of a step's
supervision is here, on every trainer, before the step's first collective; what the target sends meanwhile is of a later
step. `TrainerGroup.together` stands where that is agreed, in `Learner.learn` and in the trainer's validation.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle_rpc.errors import ConfigError, ConnectionLost, EagleRpcError, TargetUnavailable, WaitTimeout

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_CPU = torch.device("cpu")
# torch 2.13 renames it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TrainerGroup:
    """`size` trainers, this one with number `rank`. Without a process group a trainer is alone and nothing waits.

    Every wait ends after the process group's time-out: with `WaitTimeout` if the others are silent, with
    `ConnectionLost` if one of them is gone. Tensors on a GPU are summed by `gpu_group` where there is one; nobody waits
    for such a sum, and NCCL's watchdog ends the process if it takes longer than the time-out.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, timeout: float = 0.0, gpu_group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.broken = False
        """Whether a wait for the others has failed: there is nothing left to do together."""
        self._timeout = timeout
        self._gpu_group = gpu_group

    @property
    def is_primary(self) -> bool:
        """Whether this trainer writes checkpoints and reports."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Replaces the tensor by its sum over all trainers, with the same bits on each; `what` is for error messages."""
        if self.size > 1:
            with self.bounded(f"the sum of {what}"):
                dist.all_reduce(
                    tensor, op=dist.ReduceOp.SUM, group=self._gpu_group if tensor.is_cuda else None
                )
        return tensor

    def sum_parts(self, part: Tensor, whole: Tensor, what: str) -> None:
        """Stores in `part` this trainer's part of the sum of `whole` over all trainers; `whole` has `size` parts along dim 0."""
        with self.bounded(f"the sum of {what}"):
            _reduce_scatter(
                part, whole, op=dist.ReduceOp.SUM, group=self._gpu_group if whole.is_cuda else None
            )

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All trainers in one dimension, for tensors on their `device`. Raises `ConfigError` for a GPU that several share."""
        if device.type == "cuda" and self._gpu_group is None:
            raise ConfigError(
                "train.sharding must be none where trainers share a GPU, got state: NCCL wants one each"
            )
        return DeviceMesh.from_group(
            self._gpu_group if device.type == "cuda" else dist.group.WORLD, device.type
        )

    def any_(self, mine: bool, what: str) -> bool:
        """Whether it holds for any trainer; all learn the same."""
        if self.size == 1:
            return mine
        return bool(self.sum_(torch.tensor([int(mine)]), what).item())

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around what each trainer gets from a target: it fails on all trainers or on none.

        So those that could go on learn of it before they start what needs everyone. Raises what the body raises, and
        `TargetUnavailable` where only another trainer's body did.
        """
        try:
            yield
        except EagleRpcError:
            with contextlib.suppress(ConnectionLost, WaitTimeout):
                self.any_(True, what)
            raise
        if self.any_(False, what):
            raise TargetUnavailable(
                f"trainer {self.rank} of {self.size}: another trainer did not get {what}; its log says why"
            )

    def barrier(self, what: str) -> None:
        """Returns when all trainers have come here."""
        if self.size > 1:
            with self.bounded(what):
                dist.monitored_barrier(timeout=timedelta(seconds=self._timeout), wait_all_ranks=True)

    def require_equal(self, digests: Mapping[str, str]) -> None:
        """Raises `ConfigError` naming the first entry (a name and a SHA-256 in hex) that differs between trainers."""
        if self.size == 1:
            return
        mine = torch.tensor([list(bytes.fromhex(digest)) for digest in digests.values()], dtype=torch.uint8)
        everyone = self._gather(mine, "the comparison of " + ", ".join(digests))
        for position, name in enumerate(digests):
            for rank in range(1, self.size):
                first, other = (bytes(everyone[r, position].tolist()).hex()[:12] for r in (0, rank))
                if first != other:
                    raise ConfigError(
                        f"{name} must be equal on all trainers, got {first} on trainer 0 and {other} on trainer {rank}"
                    )

    def has_one_gpu_each(self, device: torch.device) -> bool:
        """Whether every trainer's device is a GPU that no other trainer uses; all learn the same."""
        name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        mine = bytes(_DIGEST_BYTES) if name is None else hashlib.sha256(name.encode()).digest()
        everyone = self._gather(torch.tensor([list(mine)], dtype=torch.uint8), "the comparison of devices")
        digests = {bytes(row) for row in everyone[:, 0].tolist()}
        return len(digests) == self.size and bytes(_DIGEST_BYTES) not in digests

    def _gather(self, mine: Tensor, what: str) -> Tensor:
        """Every trainer's digests, [size, n, 32] uint8, from one's own [n, 32]."""
        everyone = mine.new_empty(self.size, *mine.shape)
        with self.bounded(what):
            dist.all_gather(list(everyone), mine)
        return everyone

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Gives torch's errors of a wait for the others their class, and says what was waited for."""
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            raise _wait_error(
                error, f"trainer {self.rank} of {self.size}, waiting for {what}", self._timeout
            ) from error


@contextlib.contextmanager
def join_trainers(
    store: dist.Store, rank: int, size: int, *, timeout: float, device: torch.device = _CPU
) -> Iterator[TrainerGroup]:
    """The group of all trainers while the body runs; `store` is a namespace of their own, `device` holds the draft.

    Trainers talk over gloo. Where each has a GPU of its own, NCCL sums what is on the GPUs; trainers that share one cannot
    use it. `timeout` in seconds bounds the start and every later wait, so it has to exceed what one trainer may be busy
    with alone: a request to the target, a checkpoint. Raises `WaitTimeout` if not all have joined by then.
    """
    if size == 1:
        yield TrainerGroup()
        return
    limit = timedelta(seconds=timeout)
    store.set_timeout(limit)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        raise _wait_error(error, f"trainer {rank}, waiting for {size} trainers to join", timeout) from error
    try:
        one_gpu_each = TrainerGroup(rank, size, timeout).has_one_gpu_each(device)
        gpu_group = dist.new_group(backend="nccl", timeout=limit) if one_gpu_each else None
        logger.info(
            "trainer %d of %d joined over %s", rank, size, "gloo and NCCL" if one_gpu_each else "gloo"
        )
        yield TrainerGroup(rank, size, timeout, gpu_group)
    finally:
        dist.destroy_process_group()


def _wait_error(error: RuntimeError, what: str, timeout: float) -> WaitTimeout | ConnectionLost:
    """torch says by text alone whether time ran out or a peer is gone."""
    # One sentence, without the place in torch's own source.
    reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]
    if any(sign in reason.lower() for sign in ("timed out", "timeout", "failed to pass")):
        return WaitTimeout(f"{what}: gave up after {timeout:.0f} s ({reason})")
    return ConnectionLost(f"{what}: {reason}")


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and all bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
