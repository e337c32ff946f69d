from types import SimpleNamespace

import pytest

from eagle_rpc.target.stop_tokens import stop_token_ids


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (None, None, None, set()),
        (2, None, None, {2}),
        (None, [2, 5], None, {2, 5}),
        (None, None, 7, {7}),
        (2, [2, 5], 7, {2, 5, 7}),
        (0, None, None, {0}),
    ],
)
def test_every_end_of_sequence_token_ends_an_answer(config, generation, tokenizer, expected):
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=config),
        generation_config=SimpleNamespace(eos_token_id=generation),
    )
    owners = (model.config, model.generation_config, SimpleNamespace(eos_token_id=tokenizer))
    assert stop_token_ids(*owners) == expected


def test_neither_tokenizer_nor_generation_config_is_needed():
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=[3]), generation_config=None)
    assert stop_token_ids(model.config, model.generation_config, None) == {3}
