"""The work that both sides of a transport comparison do, and the way their clients are told to do it.

Runs in the environment of every side, so it needs torch and safetensors only.

Legend: B batch, T sequence, H target hidden, V target vocab, K draft vocab.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Work:
    """A random Llama target, and the batches that are asked of it again and again."""

    directory: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    draft_vocab_size: int
    batch_size: int
    length: int
    num_batches: int
    real_share: float  # of the B x T tokens, the others are padding
    answer_share: float  # of the real tokens, those that the loss mask selects
    dtype: str
    prefetch: int
    seed: int

    # Three layers, as a target of four has no default.
    aux_layer_ids = (0, 1, 2)

    @property
    def model_dir(self) -> Path:
        return Path(self.directory) / "model"

    @property
    def architecture(self) -> dict[str, Any]:
        """transformers' description of the target."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": 4 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": self.hidden_size // 64,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": max(2048, self.length),
            "tie_word_embeddings": False,
        }

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
        """Batches of `input_ids`, `attention_mask`, `loss_mask` [B, T] int64, and the ids [K] of the draft vocabulary."""
        stacked = load_file(Path(self.directory) / "tokens.safetensors")
        selected_token_ids = stacked.pop("selected_token_ids")
        batches = [
            {name: value[index] for name, value in stacked.items()} for index in range(self.num_batches)
        ]
        return batches, selected_token_ids


def random_batches(work: Work) -> list[dict[str, Tensor]]:
    """Chats of two turns, right-padded: lengths vary around `real_share`, the end of each turn is the answer."""
    generator = torch.Generator().manual_seed(work.seed)
    shape = (work.batch_size, work.length)
    position = torch.arange(work.length).expand(shape)
    batches = []
    for _ in range(work.num_batches):
        spread = min(1 - work.real_share, work.real_share) * (
            2 * torch.rand(work.batch_size, 1, generator=generator) - 1
        )
        real_length = ((work.real_share + spread) * work.length).round().long()
        turn_length = real_length.div(2, rounding_mode="floor").clamp_min(1)
        answer = position % turn_length >= ((1 - work.answer_share) * turn_length).long()
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
    """A client that has connected, as the command loop uses it."""

    stream: Callable[[Iterable[dict[str, Tensor]]], Iterator[Any]]  # answers in order, with prefetch
    use: Callable[[Any], int]  # reads every supervised row's probabilities; the number of those rows
    dense: Callable[
        [Any], dict[str, Tensor]
    ]  # `target_probs` [B, T, K], `position_mask` [B, T, 1], `aux_hidden_states`


def answer_commands(work: Work, side: Side) -> None:
    """Says that it is ready, then does what each line of stdin asks for and answers in a line, until stdin ends."""
    batches, _ = work.load_tokens()
    _say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if "requests" in command:
            _say(_run(side, [batches[index % len(batches)] for index in range(command["requests"])]))
        else:
            (answer,) = side.stream(batches[:1])
            save_file(
                {name: value.contiguous() for name, value in side.dense(answer).items()}, command["save"]
            )
            _say({"saved": command["save"]})


def _run(side: Side, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    started = time.perf_counter()
    supervised = sum(side.use(answer) for answer in side.stream(batches))
    return {"seconds": time.perf_counter() - started, "supervised": supervised}


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
