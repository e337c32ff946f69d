"""Hidden states in float8: what rounding keeps, and the encoding that sends them.

Legend: R states, H target hidden, V target vocab.
"""

import pytest
import torch
from test_contract import H, LinearTarget, encoded_and_decoded, tokens_of

from eagle_rpc.supervision import ENCODINGS
from eagle_rpc.supervision.fp8_states import DTYPE, from_fp8, to_fp8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def states_of(num_states: int, dtype: torch.dtype, layers: int = 3) -> torch.Tensor:
    """Of tokens whose sizes differ by a factor of a million."""
    generator = torch.Generator().manual_seed(num_states)
    sizes_R1 = torch.logspace(-3, 3, num_states)[:, None]
    return (torch.randn(num_states, layers * H, generator=generator) * sizes_R1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_keeps_four_significant_bits_at_the_scale_of_its_token_and_layer(dtype):
    # More states than one piece holds.
    states_RW, places_R = states_of(2500, dtype), torch.randperm(2500)[:2100]
    fp8_RW, scales_RC = to_fp8(states_RW, places_R, H)
    assert (fp8_RW.dtype, fp8_RW.shape) == (DTYPE, (2100, 3 * H))
    assert (scales_RC.dtype, scales_RC.shape) == (torch.float32, (2100, 3))
    found_RW, true_RW = from_fp8(fp8_RW, scales_RC, dtype).double(), states_RW[places_R].double()
    smallest_step_RW = scales_RC.repeat_interleave(H, dim=1) * 2**-9
    rounding = torch.finfo(dtype).eps
    bound_RW = torch.maximum(true_RW.abs() * (2**-4 + rounding), smallest_step_RW)
    assert bool(((found_RW - true_RW).abs() <= bound_RW).all())
    largest_RC = true_RW.unflatten(1, (3, H)).abs().amax(-1)
    assert torch.allclose(found_RW.unflatten(1, (3, H)).abs().amax(-1), largest_RC, rtol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_broken_states_stay_broken(dtype):
    states_RW = states_of(4, dtype)
    states_RW[0] = 0.0
    states_RW[1, 0], states_RW[2, H] = float("nan"), float("inf")
    found_RCH = from_fp8(*to_fp8(states_RW, torch.arange(4), H), dtype).unflatten(1, (3, H))
    assert not found_RCH[0].any()
    assert not found_RCH[1, 0].isfinite().all() and not found_RCH[2, 1].isfinite().all()
    assert found_RCH[1, 1:].isfinite().all() and found_RCH[3].isfinite().all()


def test_rounding_twice_is_rounding_once():
    states_RW, everything = states_of(50, torch.float32), torch.arange(50)
    once = from_fp8(*to_fp8(states_RW, everything, H), torch.float32)
    assert torch.allclose(from_fp8(*to_fp8(once, everything, H), torch.float32), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_only_states_are_rounded_and_only_by_float8(dtype, packed):
    target, tokens = LinearTarget(3, 16, dtype), tokens_of(packed=packed)
    _, exact = encoded_and_decoded(target, tokens, "hidden")
    encoded, batch = encoded_and_decoded(target, tokens, "hidden_fp8")
    assert encoded.aux.dtype == encoded.values.dtype == DTYPE
    for name in ("supervised_rows", "log_normalizer", "argmax", "input_ids", "loss_mask"):
        assert torch.equal(getattr(batch, name), getattr(exact, name)), name
    real = tokens.attention_mask.bool()
    for found, true in (
        (batch.aux_hidden_states[real], exact.aux_hidden_states[real]),
        (batch.targets.values, exact.targets.values),
    ):
        assert found.dtype == dtype and len(found) and not torch.equal(found, true)
        everything = torch.arange(len(true))
        assert torch.equal(found, from_fp8(*to_fp8(true, everything, H), dtype))
    assert not batch.aux_hidden_states[~real].any()
    assert torch.allclose(batch.target_probs, exact.target_probs, atol=0.1)


def test_the_encoding_says_that_it_is_not_exact_and_halves_the_bytes():
    assert [name for name, encoding in ENCODINGS.items() if not encoding.exact] == ["hidden_fp8"]
    sizes = {"hidden_size": 4096, "draft_vocab_size": 32000, "dtype_bytes": 2}
    fp8, exact = (ENCODINGS[name].bytes_per_token(**sizes) for name in ("hidden_fp8", "hidden"))
    assert fp8 == 4 * (4096 + 4) + 12
    assert 0.5 < fp8 / exact < 0.501
