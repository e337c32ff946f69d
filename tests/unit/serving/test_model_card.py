"""What the model card of an export says."""

from dataclasses import replace

from huggingface_hub import ModelCard
from test_export import CONFIG

from eagle_rpc.serving.model_card import Training, model_card, with_measured, write_measured

TRAINING = Training(
    target="owner/Target-8B",
    target_class="LlamaForCausalLM",
    aux_layer_ids=(1, 5, 8),
    sources=["/home/someone/private/chats.jsonl", "owner/set@train"],
    data_digest="abc",
    settings={"loss": "kl"},
    versions={"eagle-rpc": "0.1.0", "torch": "2.14.1"},
    step=200,
    validation=1.234,
)


def test_a_card_has_metadata_of_the_hub_and_leaves_the_licence_out():
    card = ModelCard(model_card(CONFIG, TRAINING))
    assert card.data.base_model == "owner/Target-8B" and "eagle3" in card.data.tags
    assert card.data.license is None and "No licence is set" in card.text


def test_a_card_names_what_was_trained_and_no_directory_of_this_machine():
    text = model_card(CONFIG, TRAINING)
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in text.splitlines()
        if line.startswith("| ") and line[2] != "|"
    )
    assert rows["training data"] == "chats.jsonl, owner/set@train"
    assert rows["optimiser steps"] == "200" and rows["accept length in validation"] == "1.234"
    assert rows["captured layers, counted after the layer"] == "1, 5, 8"
    assert "someone" not in text


def test_a_target_on_this_machine_is_no_base_model(tmp_path):
    text = model_card(CONFIG, replace(TRAINING, target=str(tmp_path / "Mine")))
    assert ModelCard(text).data.base_model is None and "Mine (LlamaForCausalLM)" in text
    assert str(tmp_path) not in text


def test_a_later_evaluation_takes_the_place_of_an_earlier_one(tmp_path):
    card = model_card(CONFIG, TRAINING)
    once = with_measured(card, {"accept length": "1.5"})
    twice = with_measured(once, {"accept length": "1.7"})
    assert "| accept length | 1.7 |" in twice and "1.5" not in twice
    assert twice.partition("## Measured")[0] == card.partition("## Measured")[0]
    (tmp_path / "README.md").write_text(card)
    write_measured(tmp_path, {"accept length": "1.5"})
    assert (tmp_path / "README.md").read_text() == once


def test_a_card_that_somebody_else_wrote_stays_as_it_is(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    write_measured(tmp_path, {"accept length": "1.5"})
    assert (tmp_path / "README.md").read_text() == "mine\n"
    write_measured(tmp_path / "absent", {"accept length": "1.5"})
