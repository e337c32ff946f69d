"""An engine's outcome beside ours."""

from dataclasses import replace

from evaluation_cases import PROMPTS, tiny_export, tiny_model

from eagle_rpc.evaluate import ServedDraft, decode_here
from eagle_rpc.serving.engine_side import DecodingWork


def outcome(tmp_path, seed=0):
    model = tiny_model()
    export = tiny_export(model, tmp_path / f"draft{seed}", seed)
    work = DecodingWork("vllm", "", "", "float32", PROMPTS, 12, 2, [])
    return decode_here(model, export, work)


def test_equal_outcomes_are_ours_and_the_control_has_to_differ(tmp_path):
    ours = outcome(tmp_path)
    assert [len(text) for text in ours.texts] == [12, 12, 12]
    other = replace(ours, num_drafts=[number + 1 for number in ours.num_drafts])
    assert ServedDraft(engine="vllm", ours=ours, theirs=ours, control=other).is_ours
    silent = ServedDraft(engine="vllm", ours=ours, theirs=ours, control=ours)
    assert not silent.is_ours and "DOES NOT SHOW" in silent.summary()


def test_differing_prompts_are_named(tmp_path):
    ours = outcome(tmp_path)
    theirs = replace(
        ours, num_drafts=[*ours.num_drafts[:2], 99], texts=[ours.texts[0], [1, 2], ours.texts[2]]
    )
    served = ServedDraft(engine="vllm", ours=ours, theirs=theirs, control=None)
    assert (served.differing_texts, served.differing_counts, served.is_ours) == ([1], [2], False)
    assert "texts  DIFFER in 1 prompts, the first is number 2" in served.summary()
    assert served.to_json()["differing_counts"] == [2]
