"""Noise on the captured states of a training batch, against the errors that a draft's own outputs bring."""

import hashlib
from dataclasses import replace

import torch

from eagle_rpc.supervision import Eagle3TargetBatch, to_device


class AuxNoise:
    """Adds uniform noise of at most `size`, as EAGLE trains with U(-0.1, 0.1) (arXiv 2401.15077, section 4).

    It is a function of `seed`, trainer, step and number of the micro-batch, so that a resumed run adds the
    same.
    """

    def __init__(self, size: float, *, seed: int, trainer: int) -> None:
        self._size, self._origin = size, f"{seed} {trainer}"

    def added_to(self, batch: Eagle3TargetBatch, step: int, number: int) -> Eagle3TargetBatch:
        """The batch with noise in a copy of its states, at real tokens."""
        states = batch.aux_hidden_states
        identity = hashlib.sha256(f"{self._origin} {step} {number}".encode()).digest()
        draw = torch.Generator(states.device).manual_seed(int.from_bytes(identity[:7], "little"))
        noise = torch.empty_like(states).uniform_(-self._size, self._size, generator=draw)
        noise *= to_device(batch.tokens.attention_mask, states.device).unsqueeze(-1)
        return replace(batch, aux_hidden_states=noise.add_(states))
