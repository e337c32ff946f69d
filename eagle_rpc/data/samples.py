"""Samples: the token ids of a chat, or of a part of it, and the ids among them that the target said."""

from collections.abc import Iterable
from dataclasses import dataclass

from eagle_rpc.data.chats import KeptAnswer


@dataclass(frozen=True, slots=True)
class Sample:
    """Ids of one sequence to train on. `mask` is true at the ids that the target said."""

    ids: list[int]
    mask: list[bool]


def samples_of(answers: Iterable[KeptAnswer]) -> list[Sample]:
    """The samples of one chat's answers, in their order.

    While each prompt begins with all ids before it, one sample holds several answers. Otherwise, as with
    templates that drop earlier thoughts, the answer starts a sample of its own, in which it alone is
    supervised. A sample that supervises nothing after its first id is left out: no id precedes the first one.
    """
    samples: list[Sample] = []
    ids: list[int] = []
    for answer in answers:
        goes_on = bool(ids) and answer.prompt_ids[: len(ids)] == ids
        if not goes_on:
            samples.append(Sample([], []))
        sample = samples[-1]
        sample.ids.extend(answer.prompt_ids[len(sample.ids) :])
        sample.mask.extend([False] * (len(sample.ids) - len(sample.mask)))
        sample.ids.extend(answer.answer_ids)
        sample.mask.extend([True] * len(answer.answer_ids))
        ids = sample.ids
    return [sample for sample in samples if any(sample.mask[1:])]
