from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from data_cases import dataset_of_lengths

from eagle_rpc.data import BatchPlan
from eagle_rpc.errors import ConfigError, DataError

LENGTHS = [3 + (number * 37) % 190 for number in range(203)]
DATASET = dataset_of_lengths(*LENGTHS)


def plans(dataset=DATASET, *, num_ranks=1, batch_size=4, seed=0, **options):
    return [
        BatchPlan(dataset, batch_size=batch_size, seed=seed, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]


def chats_of(batch):
    return (batch.input_ids[:, 0] - 1).tolist()


def chats(plan, number):
    """Of a micro-batch with one chat a row."""
    return [chat for (chat,) in plan.sequences(number)]


def epoch(plan, number=0):
    return range(number * plan.batches_per_epoch, (number + 1) * plan.batches_per_epoch)


def same(batch, other):
    return all(
        torch.equal(getattr(batch, name), getattr(other, name))
        for name in ("input_ids", "attention_mask", "loss_mask")
    )


def stream(num_ranks, count, *, batch_size=4, start=0, **options):
    """The first `count` sequences or more that trainers see together from position `start` on."""
    ranks = plans(num_ranks=num_ranks, batch_size=batch_size, **options)
    seen = []
    for position in range(start, start + count, ranks[0].sequences_per_batch):
        parts = [plan._sequences_from(position) for plan in ranks]
        turn = position // ranks[0].sequences_per_batch
        for place in range(num_ranks):
            seen += parts[(place - turn) % num_ranks]
    return seen


@pytest.mark.parametrize("packed_length", [None, 256])
def test_the_order_of_the_data_does_not_depend_on_the_number_of_trainers(packed_length):
    alone = stream(1, 600, packed_length=packed_length)
    for num_ranks in (2, 3, 8):
        assert stream(num_ranks, 500, packed_length=packed_length)[:500] == alone[:500]


@pytest.mark.parametrize("packed_length", [None, 256])
@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (2, 4), (3, 5), (7, 1), (2, 300)])
def test_every_epoch_has_each_chat_exactly_once(num_ranks, batch_size, packed_length):
    options = {"batch_size": batch_size, "packed_length": packed_length}
    size = plans(**options)[0].sequences_per_epoch
    seen = stream(num_ranks, 3 * size, **options)
    for number in range(3):
        sequences = seen[number * size : (number + 1) * size]
        assert Counter(chat for sequence in sequences for chat in sequence) == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("packed_length", [None, 256])
def test_trainers_of_another_number_go_on_where_the_others_stopped(packed_length):
    options = {"packed_length": packed_length}
    size = plans(**options)[0].sequences_per_epoch
    first = stream(2, 40, **options)
    rest = stream(3, 2 * size - len(first), start=len(first), **options)
    assert (first + rest)[: 2 * size] == stream(1, 2 * size, **options)[: 2 * size]


def test_data_that_end_have_one_epoch_with_a_smaller_last_batch():
    plan = plans(batch_size=50, endless=False)[0]
    batches = [plan.batch(number) for number in epoch(plan)]
    assert [len(batch.input_ids) for batch in batches] == [50, 50, 50, 50, 3]
    assert Counter(chat for batch in batches for chat in chats_of(batch)) == Counter(range(len(LENGTHS)))


def test_a_batch_is_a_function_of_the_arguments_and_its_number():
    plan = plans()[0]
    numbers = [70, 3, 3, 160, 0, 51]
    again = {number: plan.batch(number) for number in reversed(numbers)}
    assert all(same(plans()[0].batch(number), again[number]) for number in numbers)


def test_a_stream_resumes_at_any_number_across_epochs():
    plan = plans(num_ranks=2)[1]
    start = plan.batches_per_epoch - 2
    position = start * plan.sequences_per_batch
    for number, batch in enumerate(islice(plan.batches(position), 5), start=start):
        assert same(batch, plan.batch(number))
    assert same(next(plan.batches()), plan.batch(0))


def test_every_epoch_and_every_seed_has_its_own_order():
    plan, other = plans()[0], plans(seed=1)[0]
    orders = [
        [chats_of(source.batch(i)) for i in epoch(source, number)]
        for source in (plan, other)
        for number in (0, 1)
    ]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    groups = [{frozenset(batch) for batch in order} for order in orders]
    assert len(groups[0] & groups[1]) < len(groups[0]) / 4


def test_rows_are_padded_on_the_right_with_masks_to_match():
    batch = plans(num_ranks=2)[0].batch(5)
    for chat, ids, real, loss in zip(
        chats_of(batch), batch.input_ids, batch.attention_mask, batch.loss_mask, strict=True
    ):
        example = DATASET[chat]
        length = len(example.input_ids)
        assert torch.equal(ids[:length], example.input_ids)
        assert torch.equal(loss[:length], example.loss_mask)
        assert real[:length].all()
        assert not real[length:].any()
        assert not loss[length:].any()
        assert not ids[length:].any()
    assert batch.segment_ids is None
    batch.check(vocab_size=len(LENGTHS) + 8, max_length=192, max_tokens=4 * 192)


def test_chats_of_similar_length_share_a_batch_but_long_batches_do_not_come_in_a_row():
    plan = plans(batch_size=8)[0]
    longest = [max(LENGTHS[chat] for chat in chats(plan, i)) for i in epoch(plan)]
    tokens = sum(LENGTHS[chat] for i in epoch(plan) for chat in chats(plan, i))
    assert tokens / (8 * sum(longest)) > 0.75
    rises = sum(earlier < later for earlier, later in pairwise(longest))
    assert 0.25 < rises / len(longest) < 0.75


def test_the_ranks_get_about_as_many_tokens():
    dataset = dataset_of_lengths(*(3 + (number * 37) % 190 for number in range(4000)))
    ranks = plans(dataset, num_ranks=4, batch_size=2)
    tokens = [[sum(dataset.lengths[chats(plan, i)]) for plan in ranks] for i in epoch(ranks[0])]
    shares = [sum(column) for column in zip(*tokens, strict=True)]
    assert max(shares) / min(shares) < 1.03
    assert sum(map(max, tokens)) / (sum(map(sum, tokens)) / 4) < 1.05


def test_the_longest_chat_of_a_batch_falls_to_each_rank_in_turn():
    ranks = plans(num_ranks=3, batch_size=1)
    longest = Counter(
        max(range(3), key=lambda rank: LENGTHS[chats(ranks[rank], i)[0]]) for i in epoch(ranks[0])
    )
    assert min(longest[rank] for rank in range(3)) > ranks[0].batches_per_epoch / 6


@pytest.mark.parametrize(
    ("longest", "options", "padded"),
    [
        (64, {}, 64),
        (65, {}, 128),
        (65, {"bucket_lengths": [32, 80, 256]}, 80),
        (80, {"bucket_lengths": [32, 80, 256]}, 80),
        (81, {"bucket_lengths": [32, 80, 256]}, 256),
        (65, {"bucket_lengths": [256, 32, 80]}, 80),
    ],
)
def test_batches_are_padded_to_a_bucket_or_a_multiple_of_64(longest, options, padded):
    plan = BatchPlan(dataset_of_lengths(10, longest), batch_size=2, **options)
    assert plan.batch(0).shape == (2, padded)


def test_rounding_does_not_pass_the_longest_allowed_length():
    plan = BatchPlan(dataset_of_lengths(10, 90, max_length=100), batch_size=2)
    assert plan.batch(0).shape == (2, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"train\.batch_size must be positive, got 0"),
        ({"rank": 2, "num_ranks": 2}, r"rank must lie in \[0, 2\), got 2"),
        (
            {"bucket_lengths": [64, 128]},
            r"data\.bucket_lengths must reach the longest sequence of 192 tokens, got 128",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchPlan(DATASET, **{"batch_size": 4, **options})


def test_no_chats_make_no_batches():
    with pytest.raises(DataError, match="at least one chat"):
        BatchPlan(dataset_of_lengths(), batch_size=1)
