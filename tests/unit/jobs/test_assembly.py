import pytest
import torch
from transformers import LlamaConfig

from eagle_rpc.config import Config
from eagle_rpc.config.schema import DataConfig, DraftConfig, TrainConfig
from eagle_rpc.data import ChatDataset, Example
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.jobs.assembly import log_padding, make_draft, plan_batches, require_room
from eagle_rpc.supervision import TargetShape


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(max_length=300),
        DataConfig(max_length=200, bucket_lengths=[128, 300]),
        DataConfig(max_length=200, packing=True, row_length=300),
    ],
)
def test_batches_longer_than_the_target_accepts_are_refused_before_training(data: DataConfig):
    require_room(Config(data=data), 300)
    with pytest.raises(
        ConfigError, match=r"data\.max_length .* must be at most the target's 299 tokens, got 300"
    ):
        require_room(Config(data=data), 299)


@pytest.mark.parametrize(
    ("data", "shapes"),
    [
        (DataConfig(max_length=64), [(2, 64), (2, 64)]),
        (DataConfig(max_length=64, packing=True), [(2, 64)]),
        (DataConfig(max_length=48, packing=True, bucket_lengths=[32, 80]), [(2, 80)]),
        (DataConfig(max_length=48, packing=True, row_length=70), [(2, 70)]),
    ],
)
def test_batches_are_packed_as_the_configuration_says(data: DataConfig, shapes: list[tuple[int, int]]):
    chats = [
        Example(torch.arange(length), torch.ones(length, dtype=torch.bool)) for length in (40, 30, 25, 24)
    ]
    plan = plan_batches(
        Config(data=data, train=TrainConfig(batch_size=2)), ChatDataset(chats, max_length=data.max_length)
    )
    assert [plan.batch(number).shape for number in range(plan.batches_per_epoch)] == shapes


def test_what_packing_saves_is_logged_whether_it_is_on_or_off(caplog: pytest.LogCaptureFixture):
    chats = ChatDataset([Example(torch.arange(32), torch.ones(32, dtype=torch.bool))] * 8, max_length=64)
    for packing in (True, False):
        with caplog.at_level("INFO"):
            log_padding(Config(data=DataConfig(max_length=64, packing=packing)), chats, num_ranks=1)
    outcome = (
        "padding is 0.0 % of the tokens with packing and 50.0 % without it, in 1 and 2 micro-batches an epoch"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"data.packing={on}: {outcome}" for on in ("true", "false")
    ]


class HeadlessBackend:
    """Gives token embeddings, but no rows of its head."""

    def input_embeddings(self) -> torch.Tensor:
        return torch.zeros(96, 32)

    def output_embeddings(self) -> None:
        raise UnsupportedTarget("the head is a mixture")


def test_a_target_without_a_plain_head_is_told_how_to_train_all_the_same():
    target = TargetShape.of(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
        )
    )
    with pytest.raises(UnsupportedTarget, match=r"draft\.seed_head must be false .*: the head is a mixture"):
        make_draft(Config(draft=DraftConfig(vocab_size=40)), target, HeadlessBackend(), torch.device("cpu"))
    unseeded = Config(draft=DraftConfig(vocab_size=40, seed_head=False))
    assert make_draft(unseeded, target, HeadlessBackend(), torch.device("cpu")).lm_head.weight.shape == (
        40,
        32,
    )
