"""Every Triton kernel against the formula of its name, which is what the CPU tests check."""

import pytest
import torch
from gpu_marks import ON_A_GPU

from eagle_rpc.draft import LOSSES
from eagle_rpc.draft.fused import formulas, own_slots

pytestmark = ON_A_GPU


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda", dtype)


def assert_kernel_equals_formula(name: str, *arguments: object) -> None:
    """Results and every tensor that is given, after formula and kernel have had copies of the same arguments."""
    outcomes = []
    for function in (getattr(formulas, name).__wrapped__, getattr(formulas, name)):
        copies = [
            argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments
        ]
        results = function(*copies)
        outcomes.append((results, [copy for copy in copies if isinstance(copy, torch.Tensor)]))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("width", [64, 1000, 4096])
def test_rms_norm(width):
    x, weight, grad, passed = (
        normal(700, width),
        normal(width, dtype=torch.float32),
        normal(700, width + 1)[:, 1:],
        normal(700, width),
    )
    assert_kernel_equals_formula("rms_norm", x, weight, 1e-5)
    weight_grad = torch.ones(width, device="cuda")
    for residual in (None, passed):
        assert_kernel_equals_formula(
            "rms_norm_backward",
            grad.contiguous(),
            x,
            (weight, 1e-5),
            weight_grad,
            residual,
            torch.empty_like(x).zero_(),
        )


def test_gradients_of_a_norm_may_be_overwritten():
    x, weight, grad, passed = (
        normal(9, 96),
        normal(96, dtype=torch.float32),
        normal(9, 97)[:, 1:].contiguous(),
        normal(9, 96),
    )
    expected, into_grad, into_passed = torch.empty_like(x), grad.clone(), passed.clone()
    norm, unread = (weight, 1e-5), torch.zeros_like(weight)
    formulas.rms_norm_backward(grad, x.clone(), norm, unread, passed, expected)
    formulas.rms_norm_backward(into_grad, x.clone(), norm, unread, passed, into_grad)
    formulas.rms_norm_backward(grad, x.clone(), norm, unread, into_passed, into_passed)
    assert torch.equal(into_grad, expected) and torch.equal(into_passed, expected)


@pytest.mark.parametrize("width", [100, 3072])
def test_swiglu(width):
    assert_kernel_equals_formula("swiglu", normal(33, 2 * width))
    assert_kernel_equals_formula(
        "swiglu_backward", normal(33, width), normal(33, 2 * width), torch.zeros_like(normal(33, width))
    )


@pytest.mark.parametrize("table_rows", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rotation(table_rows, head_dim):
    batch, length, queries, keys = 3, 50, 20 * head_dim, 5 * head_dim
    angles = 10 * normal(table_rows, 1, length, head_dim // 2, dtype=torch.float32)
    tables, width = (angles.cos(), angles.sin()), queries + 2 * keys
    out = torch.zeros(batch, length, width, device="cuda", dtype=torch.bfloat16)
    embed_part = normal(batch, length + 6, width)[:, 4 : 4 + length]
    hidden_part, by_kernel = normal(batch, length, width), out.clone()
    formulas.add_and_rotate.__wrapped__(hidden_part, embed_part, tables, keys, out)
    formulas.add_and_rotate(hidden_part, embed_part, tables, keys, by_kernel)
    torch.testing.assert_close(by_kernel, out, rtol=2e-2, atol=2e-3)
    assert_kernel_equals_formula(
        "rotate_back", normal(batch, length, queries), normal(batch, length, 2 * keys), tables, out
    )


def test_sum_readers():
    readers = torch.randint(-1, 80, (7, 90), generator=torch.Generator().manual_seed(0)).cuda()
    assert_kernel_equals_formula("sum_readers", normal(7, 80, 1100), readers)


def test_rotation_of_slots_without_queries():
    keys, slots = 5 * 64, 33
    angles = 10 * normal(1, 1, slots, 32, dtype=torch.float32)
    tables, out = (angles.cos(), angles.sin()), normal(1, slots, 2 * keys)
    parts = normal(1, slots, 2 * keys), normal(1, slots, 2 * keys + 1)[..., 1:].contiguous()
    assert_kernel_equals_formula("add_and_rotate", *parts, tables, keys, out)
    assert_kernel_equals_formula("rotate_back", parts[0][..., :0], parts[1], tables, out)


@pytest.mark.parametrize("vocab", [61, 4096, 10001])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, vocab):
    logits, targets = normal(5, 7, vocab, dtype=torch.float32), 3 * normal(5, vocab)
    targets[1, 3] = -torch.inf
    log_normalizer = targets.float().logsumexp(-1) + 0.3
    coefficients = torch.rand(5, 7, device="cuda") + 0.1
    for kl_share in (0.0, 0.4) if LOSSES[loss].mixes else (0.0,):
        arguments = (3 * logits, targets, log_normalizer, coefficients, loss, kl_share)
        assert_kernel_equals_formula("judge_rows_", *arguments)


@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"), [(4, 1, 64), (7, 1, 128), (6, 2, 80), (3, 3, 256)]
)
def test_own_slots(heads, key_heads, head_dim):
    batch, length, steps = 2, 37, 4
    slots, query_width, key_width = batch * length, heads * head_dim, key_heads * head_dim
    qkv = normal(steps, slots, query_width + 2 * key_width, dtype=torch.float32)

    def run(device: str) -> list[torch.Tensor]:
        local = qkv.to(device)
        keys, values = local[..., query_width:].unflatten(-1, (-1, head_dim)).chunk(2, dim=2)
        step_heads = own_slots.StepHeads(
            step=steps - 1,
            scale=head_dim**-0.5,
            queries=local[-1, :, :query_width].unflatten(-1, (-1, head_dim)),
            keys=keys,
            values=values,
            out=normal(slots, heads, head_dim, dtype=torch.float32).to(device),
            log_sums=normal(batch, heads, length, dtype=torch.float32).to(device),
        )
        own_slots.merge(step_heads)
        out_grads = normal(slots, heads, head_dim + 1, dtype=torch.float32)[..., 1:].contiguous().to(device)
        query_grads, key_value_grads = torch.ones_like(out_grads), torch.ones_like(local[..., query_width:])
        own_slots.merge_backward(
            step_heads, out_grads, query_grads, key_value_grads.unflatten(-1, (-1, head_dim)).chunk(2, dim=2)
        )
        return [
            tensor.cpu() for tensor in (step_heads.out, step_heads.log_sums, query_grads, key_value_grads)
        ]

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=1e-4, atol=1e-4)


def test_own_slots_of_steps_whose_distance_takes_more_than_32_bits():
    steps, stride, head_dim = 6, 450_000_000, 16
    storage = torch.empty((steps - 1) * stride + 2 * head_dim, device="cuda", dtype=torch.bfloat16)
    key_values = storage.as_strided((steps, 1, 2 * head_dim), (stride, 2 * head_dim, 1))
    key_values.copy_(normal(steps, 1, 2 * head_dim))

    def merged(key_values: torch.Tensor) -> torch.Tensor:
        keys, values = key_values.unflatten(-1, (-1, head_dim)).chunk(2, dim=2)
        step_heads = own_slots.StepHeads(
            step=steps - 1,
            scale=0.25,
            queries=normal(1, 1, head_dim),
            keys=keys,
            values=values,
            out=normal(1, 1, head_dim),
            log_sums=torch.zeros(1, 1, 1, device="cuda"),
        )
        own_slots.merge(step_heads)
        return step_heads.out

    assert torch.equal(merged(key_values), merged(key_values.contiguous()))
