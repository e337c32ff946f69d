"""What the jobs share that decode held-out prompts: the target in their dtype, and the prompts."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle_rpc.config import Config
from eagle_rpc.evaluate import Prompt, read_prompts
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.jobs.prompts import ensure_prompts
from eagle_rpc.supervision import TargetShape
from eagle_rpc.target.loading import load_with_tokenizer
from eagle_rpc.topology import resolve_device


def load_decoding(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Prompt]]:
    """The target in `evaluate.dtype`, its tokenizer, and the prompts of `evaluate`.

    Raises as `load_with_tokenizer` and `read_prompts`.
    """
    ensure_prompts(config, config.evaluate.prompts)
    target = replace(config.target, dtype=config.evaluate.dtype)
    device = torch.device(resolve_device(target.device))
    model, tokenizer = load_with_tokenizer(target, device, cache_dir=config.run.cache_dir)
    shape = TargetShape.of(model.config)
    context = shape.context or shape.length(target.max_length)
    return model, tokenizer, read_prompts(config, chat_template(config, tokenizer), context)
