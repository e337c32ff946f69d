"""The text of `--help`."""

from eagle_rpc.config.attributes import attribute_docs
from eagle_rpc.config.choices import JobName
from eagle_rpc.config.compose import conf_dir
from eagle_rpc.config.overrides import groups

_TEXT = """\
Train EAGLE-3 drafts against a frozen target that runs as a torch.distributed.rpc service.

usage: eagle-rpc [GROUP=CHOICE ...] [SECTION.FIELD=VALUE ...]

jobs (job=NAME, default train):
{jobs}

groups and their choices:
{groups}

examples:
  eagle-rpc job=plan target=hf target.model=/models/M           workers, bytes and memory; starts nothing
  eagle-rpc job=regenerate target=hf target.model=/models/M     the target answers the prompts
  torchrun --standalone --nproc-per-node=3 -m eagle_rpc job=train topology=1x2 train.max_steps=500
  eagle-rpc --multirun target=hf target.model=/models/M train.learning_rate=1e-4,3e-4 run.seed=0,1,2
  eagle-rpc job=serve target=hf target.model=/models/M rpc.host_registry=true
  eagle-rpc job=train rpc=elastic run.name=mine data=chats data.train_path=chats.jsonl

With --multirun each combination of values is a run of the whole path, or of job=NAME: docs/sweeps.md
The whole configuration of a command, without running it: add --cfg job
Every setting with its type, default, rule and meaning: docs/configuration.md
"""


def usage() -> str:
    """Jobs, groups and examples; reads names from `conf/`, imports nothing heavy."""
    jobs = [f"  {name:<11} {meaning}" for name, meaning in attribute_docs(JobName).items()]
    choices = [f"  {name:<11} {', '.join(names)}" for name, names in groups(conf_dir()).items()]
    return _TEXT.format(jobs="\n".join(jobs), groups="\n".join(choices))
