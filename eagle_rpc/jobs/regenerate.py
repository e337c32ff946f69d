"""`job=regenerate`: asks the target the user turns of chats and keeps its answers."""

from dataclasses import replace

import torch

from eagle_rpc.answers.regeneration import Regeneration
from eagle_rpc.config import Config
from eagle_rpc.data import ChatWriter
from eagle_rpc.demo.prompts import ensure_prompts
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.process.startup import start_worker
from eagle_rpc.target.loading import load_with_tokenizer
from eagle_rpc.topology import resolve_device


def run(config: Config) -> int:
    """Appends to `regenerate.output` every chat of `regenerate.prompts` that is not in it; 0 if all are.

    After a kill at any moment the next run continues from the last whole line. Raises as `Regeneration` does.
    """
    start_worker(config, "regenerate")
    ensure_prompts(config)
    target = replace(config.target, dtype=config.regenerate.dtype)
    device = torch.device(resolve_device(target.device))
    model, tokenizer = load_with_tokenizer(target, device, cache_dir=config.run.cache_dir)
    template = chat_template(config, tokenizer)
    with ChatWriter(config.regenerate.output) as writer:
        Regeneration(config, model, template, writer).run()
    return 0
