"""The embedded prompts, written when a job first needs them."""

from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.config.choices import PromptSource
from eagle_rpc.demo.chitchat import prepare_chitchat_prompts

NUM_TRAIN, NUM_HELDOUT = 8000, 200


def ensure_prompts(config: Config) -> None:
    """Writes prompts for training and evaluation, without overlap, if `data.prompt_source` names a source.

    Nothing is written, and no package is needed, if both prompt files of the configuration exist.
    """
    wanted = (config.regenerate.prompts, config.evaluate.prompts)
    if config.data.prompt_source is PromptSource.chitchat and not all(Path(path).exists() for path in wanted):
        prepare_chitchat_prompts(
            Path(config.run.cache_dir) / "chitchat", num_train=NUM_TRAIN, num_heldout=NUM_HELDOUT, seed=0
        )
