"""The files of a run with everything that a report shows."""

import json
from pathlib import Path

from eagle_rpc.report.sources import Sources, read_sources

FILES = ("config.yaml", "metrics.jsonl", "training.json", "evaluation.json", "comparison.json")


SECONDS = {
    "waiting (queue)": 0.5,
    "waiting (compute)": 2.0,
    "waiting (transfer)": 0.5,
    "judging": 1.0,
    "training": 6.0,
}


def one_slice(length, prompts=4):
    return {
        "num_prompts": prompts,
        "num_drafts": 100,
        "accept_length": length,
        "accept_length_interval": [length - 0.2, length + 0.2],
    }


def evaluation(length=2.0, prompts=("Where is </script><b>Rome</b>?", "And Paris?")):
    return {
        "accept_length": length,
        "accept_length_interval": [length - 0.1, length + 0.1],
        "accept_length_by_draft_tokens": {"1": 1.6, "2": 1.9, "3": length},
        "by_category": {"code": one_slice(1.5), "facts": one_slice(2.2)},
        "by_context": {"128": one_slice(2.0), "256": one_slice(1.9)},
        "acceptance_per_position": [0.6, 0.3, 0.1],
        "acceptance_per_position_intervals": [[0.5, 0.7], [0.2, 0.4], None],
        "conditional_acceptance_per_position": [0.6, 0.5, 0.33],
        "num_prompts": len(prompts),
        "num_decoded": 1,
        "identical_texts": True,
        "counts_agree": True,
        "tokens_per_second": 30.0,
        "tokens_per_second_without_draft": 20.0,
        "settings": {"num_draft_tokens": 3, "temperature": 0.0, "versions": {"torch": "2"}},
        "prompts": [
            {
                "category": "facts",
                "prompt": prompt,
                "pieces": [["In", 0], [" Italy", 1], [" <i>", 2], [" there", 7]],
                "accept_length": length,
                "num_drafts": 3,
            }
            for prompt in prompts
        ],
    }


def metrics():
    lines = [
        {
            "step": step,
            "loss": 5 - step / 50,
            "simulated_accept_length": 1 + step / 100,
            "tokens_per_second": 100.0,
            "wait_share": 0.31,
            "wait_share_queue": 0.05,
            "wait_share_compute": 0.2,
            "wait_share_transfer": 0.06,
        }
        for step in range(10, 110, 10)
    ]
    judged = [
        {"step": step, "validation/loss": 4.0, "validation/accept_length": 1 + step / 200, **simulated}
        for step in (30, 60, 100)
        for simulated in [{"validation/simulated_accept_length": 1.2}]
    ]
    return sorted(lines + judged, key=lambda line: line["step"])


def training():
    return {
        "trainers": [{"name": "trainer0", "seconds": SECONDS}],
        "targets": [
            {
                "name": "target0",
                "seconds": {"computing": 8.0, "idle": 2.0},
                "busy_share": 0.8,
                "passes": 100,
                "tokens": 5000,
                "reply_bytes": 10**7,
            }
        ],
        "draft_vocab_size": 8192,
        "covered": 0.88,
        "coverage": [[8192, 0.88], [16384, 0.96], [49152, 1.0]],
        "setup": ["trainer0 on cpu"],
        "versions": {"torch": "2"},
    }


def comparison(directories):
    return {
        "drafts": [
            {
                "directory": str(directory),
                "parameters": 10**7,
                "overall": one_slice(2.0 + number / 10),
                "gain": number / 10,
                "gain_interval": [0.0, 0.2],
                "accept_length_by_draft_tokens": {"1": 1.5, "2": 1.8, "3": 2.0},
                "acceptance_per_position": [0.5, 0.3, 0.2],
                "by_category": {"code": one_slice(1.5), "facts": one_slice(2.2)},
                "by_context": {"128": one_slice(2.0)},
            }
            for number, directory in enumerate(directories)
        ],
        "num_prompts": 8,
        "settings": {"num_draft_tokens": 3},
    }


def write_run(path: Path, *, compared=(), **others) -> Path:
    """A run directory with all files of `FILES`, or those of `others` by stem."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("run:\n  name: a-run\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    content = {"training": training(), "evaluation": evaluation(), "comparison": comparison(compared)}
    for stem, value in (content | others).items():
        if value is not None and (stem != "comparison" or compared):
            (path / f"{stem}.json").write_text(json.dumps(value))
    return path


def sources_of(path: Path) -> Sources:
    names = {file.partition(".")[0]: path / file for file in FILES}
    return read_sources(name=path.name, **names)
