"""What a request, a mapping or an expectation must not be; every message names the field and the value."""

import pytest
import torch

from eagle_rpc import errors
from eagle_rpc.supervision import (
    ModelInfo,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
)

LIMITS = {"vocab_size": 50, "max_length": 8, "max_tokens": 20}


def tokens(**changes):
    fields = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "loss_mask": torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]),
    }
    return TokenBatch(**{**fields, **changes})


def long_ones(batch, length):
    ones = torch.ones(batch, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "loss_mask": ones}


def test_a_good_batch_passes_with_and_without_segments():
    tokens().check(**LIMITS)
    tokens(segment_ids=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])).check(**LIMITS)
    tokens(attention_mask=torch.tensor([[True] * 4, [True, True, False, False]])).check(**LIMITS)
    tokens(**long_ones(2, 8)).check(**LIMITS)


BAD = {
    "not a tensor": ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
    "flat": (
        {"input_ids": torch.ones(4, dtype=torch.long)},
        r"input_ids must have shape \[B, T\], got \[4\]",
    ),
    "other shape": (
        {"loss_mask": torch.ones(2, 3, dtype=torch.long)},
        r"loss_mask .* \[2, 4\], got \[2, 3\]",
    ),
    "other batch": (
        {"attention_mask": torch.ones(1, 4, dtype=torch.long)},
        r"attention_mask .* got \[1, 4\]",
    ),
    "int32 ids": (
        {"input_ids": torch.ones(2, 4, dtype=torch.int32)},
        "input_ids must have dtype torch.int64, got torch.int32",
    ),
    "float mask": (
        {"attention_mask": torch.ones(2, 4)},
        "attention_mask must have dtype .* got torch.float32",
    ),
    "sparse": (
        {"input_ids": torch.ones(2, 4, dtype=torch.long).to_sparse()},
        "input_ids must be a dense tensor",
    ),
    "meta": (
        {"input_ids": torch.ones(2, 4, dtype=torch.long, device="meta")},
        "input_ids must be a dense tensor",
    ),
    "negative id": (
        {"input_ids": torch.tensor([[1, -2, 3, 4], [5, 6, 0, 0]])},
        r"input_ids .* \[0, 50\), got values from -2",
    ),
    "id too large": (
        {"input_ids": torch.tensor([[1, 50, 3, 4], [5, 6, 0, 0]])},
        r"input_ids .* \[0, 50\), .* to 50",
    ),
    "mask of 2": (
        {"attention_mask": torch.tensor([[1, 1, 2, 1], [1, 1, 0, 0]])},
        "attention_mask must hold 0 and 1 only, .* to 2",
    ),
    "mask of -1": (
        {"loss_mask": torch.tensor([[0, -1, 1, 1], [0, 1, 0, 0]])},
        "loss_mask must hold 0 and 1 only, .* from -1",
    ),
    "left padding": (
        {
            "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]),
            "loss_mask": torch.zeros(2, 4, dtype=torch.long),
        },
        "attention_mask must be padded on the right",
    ),
    "empty sequence": (
        {
            "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]),
            "loss_mask": torch.zeros(2, 4, dtype=torch.long),
        },
        "attention_mask must keep at least one token",
    ),
    "supervised padding": (
        {"loss_mask": torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]])},
        "loss_mask must be 0 where attention_mask",
    ),
    "falling segments": (
        {"segment_ids": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])},
        "segment_ids must not decrease",
    ),
    "empty batch": (long_ones(0, 4), r"input_ids must hold at least one token, got shape \[0, 4\]"),
    "empty length": (long_ones(2, 0), r"input_ids must hold at least one token, got shape \[2, 0\]"),
    "too long": (long_ones(1, 9), r"at most 8 tokens long \(the target's limit\), got 9"),
    "too many": (long_ones(3, 7), "at most 20 tokens in all, got 3 x 7 = 21"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_refused_by_field_rule_and_value(case):
    changes, message = BAD[case]
    with pytest.raises(errors.InvalidRequest, match=message):
        tokens(**changes).check(**LIMITS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], "must be a tensor, got list"),
        (torch.tensor([1.0]), "must be int64"),
        (torch.tensor([[1]]), "must be int64"),
        (torch.tensor([], dtype=torch.long), "must hold 1 to 5 ids, got 0"),
        (torch.arange(6), "must hold 1 to 5 ids, got 6"),
        (torch.tensor([1, 5]), "got values from 1 to 5"),
        (torch.tensor([-1, 2]), "got values from -1 to 2"),
        (torch.tensor([3, 1, 3]), "must be distinct, got 3 more than once"),
    ],
)
def test_a_bad_mapping_is_refused(ids, message):
    with pytest.raises(errors.InvalidRequest, match=message):
        VocabMapping.from_token_ids(ids, 5)


def test_an_expectation_names_every_field_that_differs():
    info = ModelInfo(
        architecture="X",
        vocab_size=50,
        hidden_size=8,
        num_layers=6,
        aux_layer_ids=(0, 1, 2),
        dtype="float32",
        max_length=8,
        max_batch_tokens=20,
        tokenizer_fingerprint=None,
        weights_fingerprint="w",
        incarnation="i",
    )
    TargetExpectation().check(info)
    TargetExpectation(vocab_size=50, aux_layer_ids=(0, 1, 2), weights_fingerprint="w").check(info)
    with pytest.raises(
        errors.TargetMismatch, match=r"hidden_size must be 9, the target has 8; dtype must be bfloat16"
    ):
        TargetExpectation(vocab_size=50, hidden_size=9, dtype="bfloat16").check(info)
    with pytest.raises(errors.TargetMismatch, match="tokenizer_fingerprint"):
        TargetExpectation(tokenizer_fingerprint="t").check(info)


@pytest.mark.parametrize("field", ["encoding", "rows"])
def test_an_unknown_setting_of_a_session_is_refused(field):
    with pytest.raises(errors.InvalidRequest, match=f"{field} must be one of .* got 'other'"):
        SessionSpec(selected_token_ids=torch.arange(3), **{field: "other"}).check()
