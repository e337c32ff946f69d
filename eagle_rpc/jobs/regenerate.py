"""`job=regenerate`: asks the target the user turns of chats and keeps its answers."""

import datetime
from dataclasses import replace

from eagle_rpc.answers.output import open_answers
from eagle_rpc.answers.regeneration import Regeneration
from eagle_rpc.config import Config
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs import backends
from eagle_rpc.jobs.assembly import chat_template
from eagle_rpc.jobs.prompts import ensure_prompts
from eagle_rpc.process.startup import start_worker
from eagle_rpc.target.model_files import load_tokenizer


def run(config: Config) -> int:
    """Appends to `regenerate.output` every chat of `regenerate.prompts` that is not in it; 0 if all are.

    After a kill at any moment the next run continues from the last whole line. Raises as `open_answers` and
    `Regeneration` do.
    """
    start_worker(config, "regenerate")
    ensure_prompts(config, config.regenerate.prompts)
    # The format of the answers is that of the target that gives them.
    config = replace(config, target=replace(config.target, dtype=config.regenerate.dtype))
    tokenizer = load_tokenizer(config.target, cache_dir=config.run.cache_dir)
    if tokenizer is None:
        raise ConfigError("target.random has no tokenizer, which this job needs: name a stored target.model")
    with open_answers(config.regenerate.output, prompts=config.regenerate.prompts) as output:
        date = config.data.date or output.date or datetime.date.today().isoformat()
        template = chat_template(config, tokenizer, date=date)
        with backends.answerer(config, template) as answerer:
            Regeneration(config, answerer, template, output, date=date).run()
    return 0
