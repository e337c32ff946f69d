"""The work of both sides of a transport comparison, and the questions that their clients answer.

It runs in the environment of every side, so it imports torch and safetensors only.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lines import questions, say
from mixes import mask_of_mix
from safetensors.torch import load_file, save_file
from shapes import architecture
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Work:
    """A random Llama target, and the batches that are asked of it again and again."""

    directory: str
    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 32000
    draft_vocab_size: int = 8192
    batch_size: int = 4
    length: int = 512
    num_batches: int = 8
    real_share: float = 0.9  # of the B x T tokens; the rest is padding
    answer_share: float = 0.75  # of the real tokens, in the loss mask
    mix: str = ""  # a name of `MIXES`, in place of `answer_share`
    dtype: str = "float32"
    prefetch: int = 4  # requests under way
    seed: int = 0

    # Three layers, as a target of four has no default.
    aux_layer_ids = (0, 1, 2)

    @property
    def model_dir(self) -> Path:
        return Path(self.directory) / "model"

    @property
    def architecture(self) -> dict[str, Any]:
        """The target as `transformers` describes it."""
        heads = self.hidden_size // 64
        return architecture(
            "llama",
            hidden=self.hidden_size,
            width=4 * self.hidden_size,
            layers=self.layers,
            heads=heads,
            key_heads=heads,
            vocab=self.vocab_size,
            positions=max(2048, self.length),
        )

    def save(self) -> Path:
        path = Path(self.directory) / "work.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> "Work":
        return cls(**json.loads(Path(path).read_text()))

    def save_tokens(self, batches: list[dict[str, Tensor]], selected_token_ids: Tensor) -> None:
        stacked = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
        save_file(
            {**stacked, "selected_token_ids": selected_token_ids}, Path(self.directory) / "tokens.safetensors"
        )

    def load_tokens(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Batches (`input_ids`, `attention_mask`, `loss_mask` [B, T] int64) and draft vocabulary [K]."""
        stacked = load_file(Path(self.directory) / "tokens.safetensors")
        selected_token_ids = stacked.pop("selected_token_ids")
        batches = [
            {name: value[index] for name, value in stacked.items()} for index in range(self.num_batches)
        ]
        return batches, selected_token_ids


def random_batches(work: Work) -> list[dict[str, Tensor]]:
    """Right-padded rows, whose lengths vary around `real_share`: chats of a mix, or two turns that end in answers."""
    generator = torch.Generator().manual_seed(work.seed)
    shape = (work.batch_size, work.length)
    position = torch.arange(work.length).expand(shape)
    batches = []
    for number in range(work.num_batches):
        spread = min(1 - work.real_share, work.real_share) * (
            2 * torch.rand(work.batch_size, 1, generator=generator) - 1
        )
        real_length = ((work.real_share + spread) * work.length).round().long()
        turn_length = real_length.div(2, rounding_mode="floor").clamp_min(1)
        answer = position % turn_length >= ((1 - work.answer_share) * turn_length).long()
        if work.mix:
            answer = mask_of_mix(work.mix, *shape, seed=work.seed + number)
        real = position < real_length
        batches.append(
            {
                "input_ids": torch.randint(work.vocab_size, shape, generator=generator),
                "attention_mask": real.long(),
                "loss_mask": (real & answer).long(),
            }
        )
    return batches


@dataclass(frozen=True)
class Side:
    """A connected client."""

    stream: Callable[[Iterable[dict[str, Tensor]]], Iterator[Any]]  # answers in order, with prefetch
    use: Callable[[Any], int]  # reads the probabilities of all supervised rows; returns the number of rows
    # `target_probs` [B, T, K], `position_mask` [B, T, 1], `aux_hidden_states` [B, T, 3H]
    dense: Callable[[Any], dict[str, Tensor]]


def answer_commands(work: Work, side: Side) -> None:
    """Says that it is ready, then answers one question after the other: time of requests, or one saved answer."""
    batches, _ = work.load_tokens()
    say(ready=True)
    for question in questions():
        if "requests" in question:
            asked = [batches[index % len(batches)] for index in range(question["requests"])]
            started = time.perf_counter()
            supervised = sum(side.use(answer) for answer in side.stream(asked))
            say(seconds=time.perf_counter() - started, supervised=supervised)
        else:
            (answer,) = side.stream(batches[:1])
            dense = {name: value.contiguous() for name, value in side.dense(answer).items()}
            save_file(dense, question["save"])
            say(saved=question["save"])
