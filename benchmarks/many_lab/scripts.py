"""Runs of other programs of this folder: a divided target and its peer (2), pairs (3), sharded trainers (4)."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from processes import python_module

from many_lab.plan import Figures, Lab, Run

_BENCHMARKS = Path(__file__).parents[1]
_END_SECONDS = 30.0
_NO_CPU = "the draft's fused step and FSDP2's memory are a GPU's"


def divided_target_runs(quantizations: tuple[str | None, ...]) -> Iterator[Run]:
    """The runs of part 2 without trainers."""
    for devices in (2, 4):
        for quantization in quantizations:
            form = quantization or "bf16"
            yield Run(
                part=2,
                name=f"a target over {devices} cards, {form}",
                cards=devices,
                seconds=420.0,
                measure=partial(_divided_target, devices=devices, quantization=quantization),
            )
        yield Run(
            part=2,
            name=f"tensor parallelism over {devices} cards",
            cards=devices,
            seconds=420.0,
            measure=partial(_tensor_parallel, devices=devices),
        )


def pair_runs() -> Iterator[Run]:
    """Part 3."""
    for cards in (2, 4, 8):
        yield Run(
            part=3,
            name="1 pair" if cards == 2 else f"{cards // 2} pairs at once",
            cards=cards,
            seconds=180.0,
            measure=partial(_pairs, cards),
        )


def sharded_runs(sizes: tuple[str, ...]) -> Iterator[Run]:
    """Part 4."""
    for cards in (1, 2, 4):
        for size in sizes:
            for sharding in ("none", "state") if cards > 1 else ("none",):
                yield Run(
                    part=4,
                    name=f"{cards} trainer{'s' * (cards > 1)}, {size}, sharding {sharding}",
                    cards=cards,
                    seconds=240.0,
                    measure=partial(_sharded, cards, size, sharding),
                    gpus_alone=_NO_CPU,
                )


def _divided_target(
    lab: Lab, seconds: float, directory: Path, *, devices: int, quantization: str | None
) -> Figures:
    system = "compiled_fused" if lab.on_gpus else "eager"
    words = ["--out", str(directory), "--shapes", lab.work.divided, "--sizes", lab.work.size]
    words += ["--systems", system, "--devices", str(devices), "--device", lab.device]
    words += ["--quantization", quantization] if quantization else []
    _run("target", *words, seconds=seconds, directory=directory)
    return _last(directory / "target.json", "served_tokens_per_second")


def _tensor_parallel(lab: Lab, seconds: float, directory: Path, *, devices: int) -> Figures:
    words = ["--out", str(directory), "--shape", lab.work.divided, "--size", lab.work.size]
    words += ["--device", lab.device, *(["--compiled"] if lab.on_gpus else [])]
    _run(*_torchrun(devices, "tensor_parallel", *words), seconds=seconds, directory=directory)
    return _last(directory / "tensor_parallel.json", "tokens_per_second")


def _pairs(cards: int, lab: Lab, seconds: float, directory: Path) -> Figures:
    path = directory / "pairs.json"
    words = _torchrun(cards, "many_lab.pairs", lab.device, str(path), *map(str, lab.work.messages))
    _run(*words, seconds=seconds, directory=directory)
    return dict(json.loads(path.read_text()))


def _sharded(cards: int, size: str, sharding: str, lab: Lab, seconds: float, directory: Path) -> Figures:
    path = directory / "sharded.json"
    words = _torchrun(cards, "many_lab.sharded", lab.work.divided, size, sharding, str(path))
    _run(*words, seconds=seconds, directory=directory)
    return dict(json.loads(path.read_text()))


def _torchrun(processes: int, module: str, *words: str) -> list[str]:
    form = ["--standalone", f"--nproc-per-node={processes}"]
    return ["torch.distributed.run", *form, "-m", module, *words]


def _run(*words: str, seconds: float, directory: Path) -> None:
    """`python -m WORDS` of this folder. Raises `RuntimeError` with its last lines if it fails or takes longer."""
    command = python_module("script", *words)
    process = command.start(log=directory / "output.log", directory=_BENCHMARKS)
    try:
        if not process.ends(seconds):
            raise RuntimeError(f"took over {seconds:.0f} s; its output ends: {process.end_of_log(5)}")
        if code := process.poll():
            raise RuntimeError(f"ended with {code}, see {process.log}: {process.end_of_log(15)}")
    finally:
        process.end(_END_SECONDS)


def _last(path: Path, figure: str) -> Figures:
    """The last entry of a script's results that has this figure. Raises `RuntimeError` with what is there instead."""
    runs = json.loads(path.read_text())["runs"]
    found = [run for run in runs if figure in run]
    if not found:
        raise RuntimeError(f"no {figure}: {runs[-1]}")
    return dict(found[-1])
