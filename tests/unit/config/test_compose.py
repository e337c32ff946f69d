from pathlib import Path

import pytest

from eagle_rpc.config import Config
from eagle_rpc.config.choices import JobName, Quantization
from eagle_rpc.config.compose import conf_dir, load, write_config
from eagle_rpc.errors import ConfigError

CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in conf_dir().glob("*/*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_of_conf_composes(choice: str):
    required = {
        "target=hf": ["target.model=somewhere"],
        "data=chats": ["data.train_path=chats.jsonl"],
        "job=compare": ["compare.drafts=[one, other]"],
        "job=drain": ["job.drain_host=here"],
    }
    recipes = ("qwen3_8b", "llama31_8b", "gpt_oss_20b", "qwen3_30b_a3b", "llama31_70b", "large")
    required |= {f"experiment={recipe}": ["target.model=somewhere"] for recipe in recipes}
    assert isinstance(load(choice, *required.get(choice, [])), Config)


def test_a_comparison_needs_two_drafts():
    with pytest.raises(ConfigError, match=r"compare\.drafts must name at least two directories, got \['one'"):
        load("job=compare", "compare.drafts=[one, one]")


def test_a_verification_uses_a_tiny_target_unless_told_otherwise():
    assert load("job=verify").target.random
    assert not load("job=verify", "target=smollm2").target.random


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=0", "train.batch_size must be positive, got 0"),
        ("draft.step_decay=1.5", r"draft.step_decay must lie in \(0, 1\], got 1.5"),
        (
            "draft.sliding_window=6",
            r"draft.sliding_window must reach over draft.ttt_steps 7, got 6",
        ),
        (
            "target.aux_layer_ids=[3,3,5]",
            r"target.aux_layer_ids must be one to eight distinct layers .* got \[3, 3, 5\]",
        ),
        ("data.bucket_lengths=[64,32]", r"data.bucket_lengths must ascend, got \[64, 32\]"),
        ("data.bucket_lengths=[64,128]", "data.bucket_lengths must reach data.max_length 2048, got 128"),
        ("data.row_length=4096", r"data.row_length must go with data.packing=true .* got data.packing=false"),
        (
            "data={packing: true, row_length: 1024}",
            "data.row_length must reach data.max_length 2048, got 1024",
        ),
        (
            "data={packing: true, row_length: 32768}",
            "at most target.max_batch_tokens 65536, got 4 x 32768 = 131072",
        ),
        ("train.batch_size=1000", "at most target.max_batch_tokens 65536, got 1000 x 2048 = 2048000"),
        ("train.betas=[0.9]", r"train.betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ("train.autocast=float16", "train.autocast must be bfloat16 or float32 or null, got float16"),
        (
            "train={precision: fp8, autocast: null}",
            "train.autocast must be bfloat16 with train.precision=fp8, got null",
        ),
        (
            "train={precision: fp8, fused: false}",
            "train.fused must be true with train.precision=fp8, got false",
        ),
        (
            "train={precision: fp8, device: cpu}",
            "train.device must be a GPU with train.precision=fp8, got cpu",
        ),
        (
            "target.attention=paged|sdpa",
            r"target.attention must be an implementation without pages, got paged\|sdpa",
        ),
        (
            "target.compile_shapes=[4x0]",
            r"target.compile_shapes must name shapes, sequences x tokens as in 4x2048, got \['4x0'\]",
        ),
        ("rpc.worker_threads=1", "rpc.worker_threads must be at least 2, got 1"),
        ("rpc.transports=[uv,shm]", r"rpc.transports must end with uv, .* got \['uv', 'shm'\]"),
        (
            "rpc.registry='here:70000'",
            "rpc.registry must be host:port with a port in 1..65535, got here:70000",
        ),
        (f"run.name={'n' * 129}", "run.name must be at most 128 printable characters and not empty, got nnn"),
    ],
)
def test_an_impossible_value_names_field_rule_and_value(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_training_needs_a_path_or_sources():
    with pytest.raises(ConfigError, match=r"data\.train_path must be given, or data\.sources, got nothing"):
        load("data=chats")
    sources = load("data=chats", "data.sources=[{path: a.jsonl}, {path: b, weight: 0.5}]").data.sources
    assert [(source.path, source.weight) for source in sources] == [("a.jsonl", 1.0), ("b", 0.5)]


def test_each_source_keeps_the_rules():
    with pytest.raises(ConfigError) as caught:
        load("data=chats", "data.sources=[{path: a}, {weight: 0}]")
    assert "data.sources[1].path must not be empty, got" in str(caught.value)
    assert "data.sources[1].weight must be positive, got 0" in str(caught.value)


def test_single_takes_one_of_each():
    with pytest.raises(ConfigError, match=r"topology\.single .* got 2 and 1"):
        load("topology=single", "topology.targets=2")


def test_a_service_is_asked_for_answers_by_an_elastic_worker_only():
    asked = ["job=regenerate", "regenerate.backend=service"]
    with pytest.raises(ConfigError, match=r"must go with rpc\.membership=elastic .* got static"):
        load(*asked)
    assert load(*asked, "rpc=elastic").job.name is JobName.regenerate


def test_a_compiled_target_takes_packed_chats_only_if_it_was_compiled_for_them():
    packed = ["data.packing=true", "target.compile_shapes=[4x2048]"]
    with pytest.raises(ConfigError, match=r"target\.compile_packed must be true .* got false"):
        load(*packed)
    assert load(*packed, "target.compile_packed=true").target.compile_packed


def test_fp8_weights_come_from_bfloat16():
    fp8 = ["target.quantization=fp8", "target.model=somewhere"]
    with pytest.raises(
        ConfigError, match=r"target\.dtype must be bfloat16 for target\.quantization=fp8, got float16"
    ):
        load(*fp8, "target.dtype=float16")
    assert load(*fp8, "target.dtype=bfloat16").target.quantization is Quantization.fp8


@pytest.mark.parametrize("loss", ["lk_alpha", "lk_lambda"])
def test_acceptance_losses_need_the_true_probabilities(loss: str):
    with pytest.raises(
        ConfigError, match=rf"draft\.loss={loss} must not go with supervision\.encoding=probs"
    ):
        load(f"draft.loss={loss}", "supervision=probs")
    assert load(f"draft.loss={loss}", "supervision=logits").draft.loss.value == loss


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.optimiser=muon", "train.sharding=state"],
            r"train\.sharding must be none with train\.optimiser=muon, .* got state",
        ),
        (
            ["draft.train_embeddings=true", "train.sharding=state"],
            r"train\.sharding must be none with draft\.train_embeddings, .* got state",
        ),
        (
            ["train.schedule=wsd", "train.warmup_share=0.3", "train.decay_share=0.8"],
            r"train\.decay_share must be at most 1 - train\.warmup_share .* got 0\.8 with 0\.3",
        ),
        (
            ["draft.loss=kl", "draft.kl_share=0.5"],
            r"draft\.kl_share must be 0 but with draft\.loss=reverse_kl, .* got 0\.5 with kl",
        ),
        (
            ["draft.step_weighting=listed", "draft.step_weights=[1,2]"],
            r"draft\.step_weights must have a weight for each of draft\.ttt_steps 7 .* got \[1\.0, 2\.0\]",
        ),
        (
            ["draft.step_weighting=learned", "draft.step_weights=[1,2]"],
            r"draft\.step_weights must have none with draft\.step_weighting=learned, got \[1\.0, 2\.0\]",
        ),
        (
            ["train.patience=3", "train.validate_every=0"],
            r"train\.validate_every must be positive with train\.patience, got 0",
        ),
    ],
)
def test_settings_of_training_that_exclude_each_other_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.tree_nodes=4"], r"evaluate\.tree_nodes must lie between .* in \[5, 264\], got 4"),
        (
            ["evaluate.tree_nodes=6", "evaluate.tree_branching=1"],
            r"evaluate\.tree_nodes must lie between .* in \[5, 5\], got 6",
        ),
        (
            ["evaluate.tree_nodes=60", "evaluate.temperature=1", "evaluate.guesses=drawn"],
            r"evaluate\.tree_nodes must be null with evaluate\.guesses=drawn, .* got 60",
        ),
    ],
)
def test_trees_that_cannot_be_counted_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load("job=evaluate", *overrides)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"target\.model"):
        load("target=hf")


@pytest.mark.parametrize(
    "override", ["train.batchsize=4", "supervision.encoding=fp8", "train.max_steps=many", "topology=3y1"]
)
def test_unknown_keys_wrong_types_and_unknown_choices_are_refused(override: str):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load(override)


def test_mistakes_that_do_not_depend_on_each_other_are_reported_together():
    with pytest.raises(ConfigError) as raised:
        load("target=hf", "train.max_steps=0", "draft.step_decay=2", "topology=single", "topology.trainers=2")
    first, *lines = str(raised.value).splitlines()
    assert first == "4 mistakes in the configuration:"
    assert [line.split()[0] for line in lines] == [
        "target.model",
        "draft.step_decay",
        "train.max_steps",
        "topology.single",
    ]


def test_a_setting_that_breaks_its_own_rule_is_reported_once():
    with pytest.raises(ConfigError) as raised:
        load("target.session_lease=-1")
    assert str(raised.value) == "target.session_lease must be positive, got -1.0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=5", "train.max_step is not a setting; did you mean train.max_steps?"),
        ("max_steps=5", "max_steps is not a setting; did you mean train.max_steps?"),
        ("tpology=1x1", "tpology is not a setting; did you mean topology?"),
        ("job=trian", "job=trian is not a choice; did you mean train?"),
        ("topology=9x9", "topology=9x9 is not a choice; choices: 1x1, 1x2, 2x2, single"),
        ("train", "train is not an override: write GROUP=CHOICE or SECTION.FIELD=VALUE"),
        ("+train.new=1", "the configuration cannot be used: 'TrainConfig' object has no attribute 'new'"),
        ("train.betas=[1,2", "train.betas=[1,2 cannot be used: no viable alternative at input '[1,2'"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(override: str, message: str):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert str(raised.value) == message


def test_all_mistyped_names_are_reported_together():
    with pytest.raises(ConfigError, match=r"2 mistakes [^?]*max_steps\?\n  job=trian is not"):
        load("train.max_step=5", "job=trian")


def test_a_random_target_takes_any_field_of_its_architecture():
    assert load("+target.random.rope_theta=5", "target=tiny").target.random["rope_theta"] == 5


def test_a_written_configuration_loads_as_the_same_run(tmp_path: Path):
    config = load("train.batch_size=3", "target.aux_layer_ids=[1,2,3]", "job=verify")
    write_config(config, tmp_path / "config.yaml")
    assert load(directory=tmp_path) == config
