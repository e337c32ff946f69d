import copy

import pytest

from eagle_rpc.train.recording import compare_records

RECORD = {
    "supervision": [{"argmax": "aa", "target_probs": "bb"}],
    "rows": 7,
    "loss": [1.5],
    "grad_norm": [0.25],
    "weights": "cc",
}


def test_equal_records_pass():
    row = compare_records("1x2", "hidden", [RECORD, RECORD], [copy.deepcopy(RECORD), RECORD])
    assert row.passed and (row.tensors, row.rows) == (4, 14)


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("supervision", [{"argmax": "aa", "target_probs": "bx"}]),
        ("loss", [1.5000001]),
        ("grad_norm", []),
        ("weights", "cd"),
    ],
)
def test_one_differing_bit_of_one_trainer_fails_and_is_named(quantity: str, value: object):
    row = compare_records("1x2", "hidden", [RECORD, RECORD], [RECORD, {**RECORD, quantity: value}])
    assert not row.passed
    assert [name for name, equal in row.equal.items() if not equal] == [quantity]


def test_nothing_recorded_is_no_pass():
    empty = {**RECORD, "rows": 0}
    assert not compare_records("1x1", "hidden", [empty], [empty]).passed
