import torch

from eagle_rpc.draft import UnrollMemory


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
                visible[b, t, u] = segment_ids is None or bool(segment_ids[b, t] == segment_ids[b, u])
            for step in range(1, len(step_keys)):
                visible[b, t, step * length + t] = True
    scores = (queries @ keys.transpose(-1, -2) / width**0.5).masked_fill(~visible[:, None], -torch.inf)
    return scores.softmax(-1) @ values


def test_every_step_equals_an_explicit_mask():
    generator = torch.Generator().manual_seed(0)
    for segment_ids in (None, torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])):
        for steps in (1, 2, 4):
            queries = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
            keys, values = (
                [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]
                for _ in range(2)
            )
            memory = UnrollMemory(segment_ids)
            answers = [memory.attend(queries, *heads) for heads in zip(keys, values, strict=True)]
            torch.testing.assert_close(answers[-1], explicit_attention(queries, keys, values, segment_ids))
