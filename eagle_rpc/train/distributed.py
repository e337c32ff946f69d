"""Trainers that train one draft: sums over all of them, and the check that they are equal.

**Supervision before collectives.** A tensor that RPC receives on a GPU may wait until a collective there
ends, and a collective waits for the slowest trainer. A trainer that waited for a target while others are in a
collective could therefore deadlock. So each trainer has the whole supervision of a step before the step's
first collective; later arrivals belong to later steps. `TrainerGroup.together` marks this point, in
`Learner.learn` and in validation.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from eagle_rpc.errors import ConfigError, ConnectionLost, EagleRpcError, TargetUnavailable, WaitTimeout

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_CPU = torch.device("cpu")
# The name of torch 2.13 and later, else the older one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TrainerGroup:
    """`size` trainers, this one with number `rank`. A single trainer has no process group and never waits.

    Each wait is bounded by the process group's time-out. It raises `WaitTimeout` if another trainer is silent
    and `ConnectionLost` if one is gone. `gpu_group`, if given, sums tensors on GPUs; the host does not wait
    for such a sum, and NCCL's watchdog ends the process after the time-out.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, timeout: float = 0.0, gpu_group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.broken = False
        """Whether a wait for the others has failed, after which no collective can succeed."""
        self._timeout = timeout
        self._gpu_group = gpu_group

    @property
    def is_primary(self) -> bool:
        """Whether this trainer writes checkpoints and reports."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """Replaces the tensor by its sum over all trainers, bitwise equal on each; errors name `what`."""
        if self.size > 1:
            with self.bounded(f"the sum of {what}"):
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group_of(tensor))
        return tensor

    def sum_shards(self, shard: Tensor, whole: Tensor, what: str) -> None:
        """Stores this trainer's shard (of `size` along dim 0) of the sum of `whole` over all trainers."""
        with self.bounded(f"the sum of {what}"):
            _reduce_scatter(shard, whole, op=dist.ReduceOp.SUM, group=self._group_of(whole))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._gpu_group if tensor.is_cuda else None

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All trainers in one dimension. Raises `ConfigError` if `device` is a GPU that several share."""
        if device.type != "cuda":
            group = dist.group.WORLD
        elif self._gpu_group is not None:
            group = self._gpu_group
        else:
            raise ConfigError(
                "train.sharding must be none where trainers share a GPU, got state: NCCL needs one each"
            )
        assert group is not None, "trainers have to join a process group before they shard"
        return DeviceMesh.from_group(group, device.type)

    def any_(self, mine: bool, what: str) -> bool:
        """Whether `mine` is true on any trainer; the same answer on all."""
        if self.size == 1:
            return mine
        return bool(self.sum_(torch.tensor([int(mine)]), what).item())

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Makes the body, a request to a target, fail on all trainers or on none, before the next collective.

        Raises the body's own error, or `TargetUnavailable` if only the body of another trainer failed.
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
        """Returns when all trainers have called it."""
        if self.size > 1:
            with self.bounded(what):
                dist.monitored_barrier(timeout=timedelta(seconds=self._timeout), wait_all_ranks=True)

    def require_equal(self, digests: Mapping[str, str]) -> None:
        """Raises `ConfigError` naming the first digest (SHA-256 in hex) that differs between trainers."""
        if self.size == 1:
            return
        mine = torch.tensor([list(bytes.fromhex(digest)) for digest in digests.values()], dtype=torch.uint8)
        everyone = self._gather(mine, "the comparison of " + ", ".join(digests))
        for position, name in enumerate(digests):
            for rank in range(1, self.size):
                first, other = (bytes(everyone[r, position].tolist()).hex()[:12] for r in (0, rank))
                if first != other:
                    raise ConfigError(
                        f"{name} must be equal on all trainers, got {first} on trainer 0 "
                        f"and {other} on trainer {rank}"
                    )

    def has_one_gpu_each(self, device: torch.device) -> bool:
        """Whether each trainer's device is a GPU that no other trainer uses; the same answer on all."""
        name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        mine = bytes(_DIGEST_BYTES) if name is None else hashlib.sha256(name.encode()).digest()
        everyone = self._gather(torch.tensor([list(mine)], dtype=torch.uint8), "the comparison of devices")
        digests = {bytes(row) for row in everyone[:, 0].tolist()}
        return len(digests) == self.size and bytes(_DIGEST_BYTES) not in digests

    def _gather(self, mine: Tensor, what: str) -> Tensor:
        """The digests of all trainers, [size, n, 32] uint8; `mine` is [n, 32]."""
        everyone = mine.new_empty(self.size, *mine.shape)
        with self.bounded(what):
            dist.all_gather(list(everyone), mine)
        return everyone

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """Turns torch's error of a failed wait into `WaitTimeout` or `ConnectionLost`, which names `what`."""
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            who = f"trainer {self.rank} of {self.size}"
            raise _wait_error(error, f"{who}, waiting for {what}", self._timeout) from error


@contextlib.contextmanager
def join_trainers(
    store: dist.Store, rank: int, size: int, *, timeout: float, device: torch.device = _CPU
) -> Iterator[TrainerGroup]:
    """The group of all trainers while the body runs; `store` is their namespace, `device` holds the draft.

    Trainers communicate over gloo; if each has a GPU of its own, NCCL sums tensors on GPUs. `timeout` in
    seconds bounds the start and each later wait, so it has to exceed any work of one trainer alone: a request
    to the target, a checkpoint. Raises `WaitTimeout` if some trainers have not joined by then.
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
        assert gpu_group is None or isinstance(gpu_group, dist.ProcessGroup)  # every trainer is a member
        backends = "gloo and NCCL" if one_gpu_each else "gloo"
        logger.info("trainer %d of %d joined over %s", rank, size, backends)
        yield TrainerGroup(rank, size, timeout, gpu_group)
    finally:
        dist.destroy_process_group()


def _wait_error(error: RuntimeError, what: str, timeout: float) -> WaitTimeout | ConnectionLost:
    """Only the text of torch's error tells a time-out from a lost peer."""
    # Its first sentence, without the line of torch's source.
    reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]
    if any(sign in reason.lower() for sign in ("timed out", "timeout", "failed to pass")):
        return WaitTimeout(f"{what}: gave up after {timeout:.0f} s ({reason})")
    return ConnectionLost(f"{what}: {reason}")
