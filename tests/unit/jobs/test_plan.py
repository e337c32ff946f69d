"""`job=plan` of a target over several devices."""

import pytest

from eagle_rpc.config.compose import load
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs import plan

FIELDS = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 9000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def planned(capsys, *overrides, **fields):
    random = ", ".join(f"{name}: {value}" for name, value in {**FIELDS, **fields}.items()).replace(
        "True", "true"
    )
    settings = [
        "target=hf",
        "target.model=random",
        "target.device=cpu",
        "train.device=cpu",
        "target.dtype=bfloat16",
    ]
    assert plan.run(load("job=plan", f"++target.random={{{random}}}", *settings, *overrides)) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:32].strip(): line[32:] for line in lines}


def test_the_plan_names_the_layers_and_bytes_of_each_device(capsys):
    lines = planned(capsys, "topology.devices_per_target=3")
    assert lines["target0"] == "target on cpu, cpu, cpu" and lines["trainer0"] == "trainer on cpu"
    devices = [lines[f"target, device {number}"] for number in range(3)]
    assert ["layers 0 to " in devices[0], "logits" in devices[0]] == [True, False]
    assert "to 7, weights" in devices[2] and "logits" in devices[2] and "replies" in devices[2]
    assert "target, fewest devices" not in lines
    assert lines["target, passes under way"] == "4 at most, trainers keep 4 requests in flight at a target"


def test_the_plan_names_the_layers_and_bytes_of_each_stage(capsys):
    lines = planned(capsys, "topology.stages_per_target=2", "topology.devices_per_target=2")
    assert lines["target0"] == "target on cpu, cpu" and lines["target0.1"] == "stage on cpu, cpu"
    places = [(stage, device) for stage in range(2) for device in range(2)]
    devices = [lines[f"target, stage {stage}, device {device}"] for stage, device in places]
    assert "layers 0 to " in devices[0] and "to 7, weights" in devices[3]
    # Replies leave from the first stage, the head is in the last one.
    assert ["replies" in device for device in devices] == [False, True, False, False]
    assert ["logits" in device for device in devices] == [False, False, False, True]
    assert lines["target, passes under way"].startswith("5 at most")


def test_the_plan_tells_when_trainers_send_too_few_requests(capsys):
    lines = planned(capsys, "topology.devices_per_target=4", "topology.targets=2", "topology.trainers=2")
    assert lines["target, passes under way"] == (
        "5 at most, trainers keep 4 requests in flight at a target: too few to keep all devices busy "
        "(supervision.prefetch)"
    )


def test_the_plan_tells_what_fits_and_the_fewest_devices_that_are_enough(capsys):
    large = {"num_hidden_layers": 64, "hidden_size": 512, "intermediate_size": 4096}
    room = ["job.plan_device_gib=0.4", "train.batch_size=1", "data.max_length=512"]
    lines = planned(capsys, *room, **large)
    assert ", does not fit 0.4 GiB: " in lines["target, device 0"]
    assert lines["target, fewest devices"] == "topology.devices_per_target=3 fits 0.4 GiB a device"
    three = planned(capsys, *room, "topology.devices_per_target=3", **large)
    assert all(", fits 0.4 GiB: " in three[f"target, device {number}"] for number in range(3))
    two = planned(capsys, *room, "topology.devices_per_target=2", **large)
    assert any("does not fit" in two[f"target, device {number}"] for number in range(2))


def test_a_request_that_fits_nowhere_is_told(capsys):
    lines = planned(capsys, "job.plan_device_gib=0.001")
    assert lines["target, fewest devices"].startswith("more than 8: requests have to be smaller")


def test_more_devices_than_layers_are_refused(capsys):
    with pytest.raises(ConfigError, match="at most the 8 decoder layers of LlamaForCausalLM, got 9"):
        planned(capsys, "topology.devices_per_target=9")
