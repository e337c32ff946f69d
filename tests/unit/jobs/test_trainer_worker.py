import pytest
import torch
from transformers import LlamaConfig

from eagle_rpc.config import Config
from eagle_rpc.config.schema import DataConfig, DraftConfig
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.jobs.trainer_worker import make_draft, require_room


@pytest.mark.parametrize("data", [DataConfig(max_length=300), DataConfig(max_length=200, bucket_lengths=[128, 300])])
def test_batches_longer_than_the_target_accepts_are_refused_before_training(data: DataConfig):
    require_room(Config(data=data), 300)
    with pytest.raises(ConfigError, match=r"data\.max_length .* must be at most the target's 299 tokens, got 300"):
        require_room(Config(data=data), 299)


class HeadlessBackend:
    """Gives token embeddings, but no rows of its head."""

    def input_embeddings(self) -> torch.Tensor:
        return torch.zeros(96, 32)

    def output_embeddings(self) -> None:
        raise UnsupportedTarget("the head is a mixture")


def test_a_target_without_a_plain_head_is_told_how_to_train_all_the_same():
    target = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
    with pytest.raises(UnsupportedTarget, match=r"draft\.seed_head must be false .*: the head is a mixture"):
        make_draft(Config(draft=DraftConfig(vocab_size=40)), target, HeadlessBackend(), torch.device("cpu"))
    unseeded = Config(draft=DraftConfig(vocab_size=40, seed_head=False))
    assert make_draft(unseeded, target, HeadlessBackend(), torch.device("cpu")).lm_head.weight.shape == (40, 32)
