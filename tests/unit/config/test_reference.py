import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from eagle_rpc.config import Config
from eagle_rpc.config.attributes import attribute_docs
from eagle_rpc.config.choices import JobName
from eagle_rpc.config.compose import conf_dir
from eagle_rpc.config.overrides import groups
from eagle_rpc.config.usage import usage

DOCS = Path(__file__).parents[3] / "docs"


def test_the_committed_page_is_the_generated_one():
    generated = subprocess.run(
        [sys.executable, DOCS / "generate.py"], capture_output=True, text=True, check=True, timeout=60
    )
    page = (DOCS / "configuration.md").read_text()
    assert page == generated.stdout, "run python docs/generate.py > docs/configuration.md"


def test_every_setting_has_a_meaning():
    for section in fields(Config):
        documented = attribute_docs(section.type)
        assert [field.name for field in fields(section.type) if field.name not in documented] == []


def test_usage_names_every_job_group_and_choice():
    text = usage()
    for job in JobName:
        assert f"\n  {job.name:<11} {attribute_docs(JobName)[job.name]}\n" in text
    for group, names in groups(conf_dir()).items():
        assert f"\n  {group:<11} {', '.join(names)}\n" in text
    assert set(groups(conf_dir())["job"]) == {job.name for job in JobName}
