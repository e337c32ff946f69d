"""The wheel in an environment that has this package's dependencies and no checkout, used from another directory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.documents import ROOT
from support.tiny_model import save_tiny_model

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "conf", "eagle_rpc")

pytestmark = [pytest.mark.rpc, pytest.mark.slow]


def run(*command: str | Path, directory: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=directory,
        env=outside | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed_wheel(directory: Path) -> Path:
    """The programs of a new environment with the wheel; dependencies are those of this one, nothing is downloaded."""
    # Built from a copy: setuptools leaves its files beside the sources.
    copy, environment = directory / "sources", directory / "environment"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", directory, copy, directory=directory)
    shutil.rmtree(copy)
    run(sys.executable, "-m", "venv", "--without-pip", environment, directory=directory)
    python = environment / "bin" / "python"
    (wheel,) = directory.glob("eagle_rpc-*.whl")
    run(*pip, "--python", python, "install", "-q", "--no-deps", wheel, directory=directory)
    # After pip, which would otherwise find the package that is installed for the checkout.
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return environment / "bin"


@pytest.mark.timeout(1800)
def test_a_wheel_helps_plans_and_trains_from_another_directory(tmp_path: Path):
    programs, work = installed_wheel(tmp_path), tmp_path / "work"
    work.mkdir()
    place = run(programs / "python", "-c", "import eagle_rpc; print(eagle_rpc.__file__)", directory=work)
    assert Path(place.strip()).is_relative_to(programs.parent)

    model = save_tiny_model(work / "model")
    turns = [{"role": "user", "content": "What comes after 3?"}, {"role": "assistant", "content": "4 and 5."}]
    (work / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    settings = [
        "target=hf",
        f"target.model={model}",
        "target.dtype=float32",
        "topology=single",
        "run.name=tiny",
    ]
    settings += ["data=chats", "data.train_path=chats.jsonl", "data.max_length=64", "draft.vocab_size=64"]
    settings += ["draft.ttt_steps=2", "train.batch_size=2", "train.max_steps=2", "train.autocast=null"]

    program = programs / "eagle-rpc"
    assert "jobs (job=NAME, default train):" in run(program, "--help", directory=work)
    assert "draft" in run(program, "job=plan", *settings, directory=work)
    run(program, "job=train", *settings, directory=work)
    run(program, "job=export", *settings, directory=work)
    assert (work / "runs" / "tiny" / "export" / "README.md").is_file()
