from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from data_cases import dataset_of_lengths

from eagle_rpc.data import BatchPlan
from eagle_rpc.data.packing import PackedLayout
from eagle_rpc.errors import ConfigError

LENGTHS = [3 + (number * 37) % 190 for number in range(203)]
DATASET = dataset_of_lengths(*LENGTHS)


def plans(dataset=DATASET, *, num_ranks=1, batch_size=4, packed_length=256, **options):
    return [
        BatchPlan(
            dataset,
            batch_size=batch_size,
            rank=rank,
            num_ranks=num_ranks,
            packed_length=packed_length,
            **options,
        )
        for rank in range(num_ranks)
    ]


def epoch(plan, number=0):
    return range(number * plan.batches_per_epoch, (number + 1) * plan.batches_per_epoch)


def all_sequences(ranks, number=0):
    return [sequence for plan in ranks for i in epoch(plan, number) for sequence in plan.sequences(i)]


def tokens_in(sequence):
    return sum(LENGTHS[chat] for chat in sequence)


def same(batch, other):
    fields = ("input_ids", "attention_mask", "loss_mask", "segment_ids")
    return all(torch.equal(getattr(batch, name), getattr(other, name)) for name in fields)


def test_no_sequence_has_more_tokens_than_it_may():
    assert max(map(tokens_in, all_sequences(plans()))) <= 256


def test_sequences_of_a_batch_hold_whole_chats_side_by_side():
    plan = plans(num_ranks=2)[1]
    batch = plan.batch(3)
    for b, sequence in enumerate(plan.sequences(3)):
        assert len(sequence) > 1
        start = 0
        for segment, chat in enumerate(sequence):
            example, place = DATASET[chat], slice(start, start + LENGTHS[chat])
            assert torch.equal(batch.input_ids[b, place], example.input_ids)
            assert torch.equal(batch.loss_mask[b, place], example.loss_mask)
            assert batch.segment_ids[b, place].eq(segment).all()
            start = place.stop
        assert batch.attention_mask[b].sum() == start
        assert batch.attention_mask[b, :start].all()
        assert not batch.loss_mask[b, start:].any() and not batch.input_ids[b, start:].any()
        assert batch.segment_ids[b, start:].eq(len(sequence)).all()
    batch.check(vocab_size=len(LENGTHS) + 8, max_length=256, max_tokens=4 * 256)


def test_a_packed_batch_is_a_function_of_the_arguments_and_its_number():
    plan = plans()[0]
    numbers = [30, 3, 3, 60, 0, 21]
    again = {number: plan.batch(number) for number in reversed(numbers)}
    assert all(same(plans()[0].batch(number), again[number]) for number in numbers)
    start = plan.batches_per_epoch - 2
    position = start * plan.sequences_per_batch
    for number, batch in enumerate(islice(plan.batches(position), 5), start=start):
        assert same(batch, plan.batch(number))


def test_every_epoch_and_every_seed_packs_other_chats_together():
    plan, other = plans()[0], plans(seed=1)[0]
    packings = [
        set(map(frozenset, all_sequences([source], number))) for source in (plan, other) for number in (0, 1)
    ]
    for i in range(4):
        for j in range(i):
            assert packings[i] != packings[j]
    orders = [[LENGTHS[sequence[0]] for sequence in all_sequences([plan], number)] for number in (0, 1)]
    assert orders[0] != orders[1]


def test_little_of_a_packed_epoch_is_padding():
    packed, padded = plans(batch_size=2)[0], plans(batch_size=2, packed_length=None)[0]
    batches = [packed.batch(i) for i in epoch(packed)]
    real, computed = (
        sum(int(batch.attention_mask.sum()) for batch in batches),
        sum(batch.input_ids.numel() for batch in batches),
    )
    assert packed.padding_share == pytest.approx(1 - real / computed)
    assert packed.padding_share < 0.03 < padded.padding_share


def test_the_ranks_get_about_as_many_tokens():
    ranks = plans(num_ranks=4, batch_size=2)
    shares = [sum(map(tokens_in, all_sequences([plan]))) for plan in ranks]
    assert max(shares) / min(shares) < 1.1


def packed(lengths, seed=0):
    """The chats of each sequence of at most 10 tokens."""
    layout = PackedLayout(np.array(lengths), capacity=10)
    assigned = layout.assign(np.random.PCG64(seed).random_raw(len(lengths)))
    return [tuple(assigned[start:stop].tolist()) for start, stop in pairwise(layout.first)]


@pytest.mark.parametrize(
    ("lengths", "sequences"),
    [
        ([2, 3, 4, 6, 7, 8], 3),  # 8 + 2, 7 + 3, 6 + 4
        ([10, 10], 2),
        ([1] * 21, 3),
    ],
)
def test_no_more_sequences_are_opened_than_needed(lengths, sequences):
    assigned = packed(lengths)
    assert len(assigned) == sequences
    assert sorted(chat for sequence in assigned for chat in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[chat] for chat in sequence) <= 10 for sequence in assigned)


def test_the_tightest_sequence_that_suffices_is_chosen():
    """The 2 fits beside the 6 and beside the 8; beside the 8 it leaves nothing."""
    assert set(map(frozenset, packed([8, 6, 2]))) == {frozenset({0, 2}), frozenset({1})}


def test_equally_long_chats_swap_seats_and_lengths_stay_together():
    lengths = [6, 4] * 20
    packings = [packed(lengths, seed) for seed in range(3)]
    assert all(
        sorted(lengths[chat] for chat in sequence) == [4, 6]
        for sequences in packings
        for sequence in sequences
    )
    assert len({frozenset(map(frozenset, sequences)) for sequences in packings}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_length": 191}, r"data\.row_length must reach the longest chat of 192 tokens, got 191"),
        (
            {"bucket_lengths": [64, 200]},
            r"data\.bucket_lengths must reach the longest sequence of 256 tokens, got 200",
        ),
    ],
)
def test_sequences_that_cannot_hold_the_chats_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plans(**options)


def test_a_batch_is_padded_to_its_longest_sequence():
    plan = plans(dataset_of_lengths(*[30] * 4), batch_size=2, bucket_lengths=[64, 128, 256])[0]
    assert plan.batch(0).shape == (2, 128)
