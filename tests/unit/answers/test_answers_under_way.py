import pytest

from eagle_rpc.answers.answerer import answers_under_way


@pytest.mark.parametrize(
    ("generated", "finished", "finished_tokens", "longest", "share"),
    [
        # A batch of 64, of which one answer ends after 10 tokens: the limit is the estimate.
        (640, 1, 10, 96, 630 / 96),
        # All of 16 are cut at the limit in the same step.
        (384, 1, 24, 24, 15.0),
        # Later the mean of finished answers counts, with the tokens of the others on top.
        (6600, 100, 6000, 96, 600 / 66),
        # Nothing is finished, or nothing else is known to be under way.
        (640, 0, 0, 96, 0.0),
        (50, 1, 50, 96, 0.0),
    ],
)
def test_unfinished_answers_count_by_their_tokens(generated, finished, finished_tokens, longest, share):
    assert answers_under_way(generated, finished, finished_tokens, longest) == pytest.approx(share)
