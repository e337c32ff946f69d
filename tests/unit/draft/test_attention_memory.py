import torch

from eagle_rpc.draft import UnrollMemory
from eagle_rpc.draft.live_slots import LiveSlots


def explicit_attention(queries, step_keys, step_values, segment_ids):
    """Softmax over one [T, T * steps] score matrix with an explicit mask, keys repeated for their query heads."""
    batch, heads, length, width = queries.shape
    repeats = heads // step_keys[0].shape[1]
    keys = torch.cat([keys.repeat_interleave(repeats, dim=1) for keys in step_keys], dim=2)
    values = torch.cat([values.repeat_interleave(repeats, dim=1) for values in step_values], dim=2)
    visible = torch.zeros(batch, length, len(step_keys) * length, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            for u in range(t + 1):
                visible[b, t, u] = bool(segment_ids[b, t] == segment_ids[b, u])
            for step in range(1, len(step_keys)):
                visible[b, t, step * length + t] = True
    scores = (queries @ keys.transpose(-1, -2) / width**0.5).masked_fill(~visible[:, None], -torch.inf)
    return scores.softmax(-1) @ values


def test_every_step_equals_an_explicit_mask():
    """Of two rows, packed into chats or not; only live slots ask, and only their later keys count."""
    generator = torch.Generator().manual_seed(0)
    live = torch.tensor([0, 3, 4, 7, 9])
    for segment_ids, chat_lengths, live_lengths in (
        (torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]), [5, 5], [3, 2]),
        (torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]]), [2, 3, 4, 1], [1, 2, 1, 1]),
        (torch.tensor([[0, 1, 1, 2, 2], [0, 0, 0, 3, 3]]), [1, 2, 2, 3, 2], [1, 0, 2, 1, 1]),
    ):
        for steps in (1, 2, 4):
            queries = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
            keys, values = (
                [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]
                for _ in range(2)
            )
            memory = UnrollMemory(
                LiveSlots(places=live, chat_lengths=chat_lengths, live_lengths=live_lengths)
            ).layers[0]
            for step in range(steps):
                slots = [in_one_row(heads[step]) for heads in (keys, values)]
                answer = memory.attend(
                    in_one_row(queries)[:, :, live], *(slots if step == 0 else [x[:, :, live] for x in slots])
                )
            expected = explicit_attention(queries, keys, values, segment_ids)
            torch.testing.assert_close(answer, in_one_row(expected)[:, :, live])


def in_one_row(heads):
    """[B, heads, T, D] as [1, heads, B T, D]."""
    return heads.transpose(0, 1).flatten(1, 2)[None]
