"""An engine's outcome beside ours."""

from dataclasses import replace

from evaluation_cases import PROMPTS, tiny_export, tiny_model

from eagle_rpc.evaluate import ServedDraft, decode_here
from eagle_rpc.serving.engine_side import DecodingWork

NEAR_TIE = 1e-4


def outcome(tmp_path, seed=0):
    model = tiny_model()
    export = tiny_export(model, tmp_path / f"draft{seed}", seed)
    work = DecodingWork("vllm", "", "", "float32", PROMPTS, 12, 2, [])
    return decode_here(model, export, work)


def served(ours, theirs, control=None):
    return ServedDraft(engine="vllm", ours=ours, theirs=theirs, control=control, near_tie=NEAR_TIE)


def with_more_drafts(ours, *prompts):
    return replace(ours, num_drafts=[n + (i in prompts) for i, n in enumerate(ours.num_drafts)])


def with_another_token(ours, prompt, place):
    texts = [list(text) for text in ours.texts]
    texts[prompt][place] += 1
    return replace(ours, texts=texts)


def test_equal_outcomes_are_ours_and_the_control_has_to_differ(tmp_path):
    ours = outcome(tmp_path)
    assert [len(text) for text in ours.texts] == [12, 12, 12]
    assert served(ours, ours, with_more_drafts(ours, 1)).is_ours
    silent = served(ours, ours, ours)
    assert not silent.is_ours and "DOES NOT SHOW" in silent.summary()


def test_differing_prompts_are_named(tmp_path):
    ours = outcome(tmp_path)
    found = served(ours, with_another_token(with_more_drafts(ours, 2), 1, 5))
    assert (found.differing_texts, found.differing_counts, found.is_ours) == ([1], [2], False)
    assert "texts  DIFFER in 1 prompts, the first is number 2" in found.summary()
    assert found.to_json()["differing_counts"] == [2]


def test_a_text_that_ends_early_differs_whatever_the_margins(tmp_path):
    ours = outcome(tmp_path)
    ours = replace(ours, text_margins=[[0.0] * 12] * 3)
    assert served(ours, replace(ours, texts=[ours.texts[0][:4], *ours.texts[1:]])).differing_texts == [0]


def test_every_token_and_every_guess_has_a_margin(tmp_path):
    ours = outcome(tmp_path)
    assert [len(margins) for margins in ours.text_margins] == [12, 12, 12]
    assert all(margin >= 0 for margins in ours.text_margins for margin in margins)
    assert all(margin is not None and margin >= 0 for margin in ours.guess_margins)


def test_near_ties_may_differ_and_do_not_make_a_control_show(tmp_path):
    ours = outcome(tmp_path)
    margins = [[*ours.text_margins[0][:5], NEAR_TIE / 2, *ours.text_margins[0][6:]], *ours.text_margins[1:]]
    ours = replace(ours, text_margins=margins, guess_margins=[1.0, NEAR_TIE / 2, 1.0])
    other = with_another_token(with_more_drafts(ours, 1), 0, 5)
    found = served(ours, other, other)
    assert (found.near_ties, found.differing_texts, found.differing_counts) == ([0, 1], [], [])
    assert found.control_shows is False and "near ties: prompts 1, 2 differ" in found.summary()
    assert served(ours, with_another_token(ours, 0, 4)).differing_texts == [0]
    assert served(ours, other, with_more_drafts(ours, 2)).is_ours
