import pytest

from eagle_rpc.config import Config
from eagle_rpc.config.schema import DataConfig
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs.trainer_worker import require_room


@pytest.mark.parametrize("data", [DataConfig(max_length=300), DataConfig(max_length=200, bucket_lengths=[128, 300])])
def test_batches_longer_than_the_target_accepts_are_refused_before_training(data: DataConfig):
    require_room(Config(data=data), 300)
    with pytest.raises(ConfigError, match=r"data\.max_length .* must be at most the target's 299 tokens, got 300"):
        require_room(Config(data=data), 299)
