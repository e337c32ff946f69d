import inspect
import logging

from transformers import modeling_gguf_pytorch_utils as reader

from eagle_rpc.target.gguf import _own_progress


def test_a_conversion_shows_progress_of_our_style_and_leaves_transformers_as_it_was(capsys, caplog):
    caplog.set_level(logging.INFO, logger="eagle_rpc")
    theirs = reader.tqdm
    with _own_progress():
        assert list(reader.tqdm(["a", "b"], desc="Converting")) == ["a", "b"]
    assert reader.tqdm is theirs
    assert "Converting" not in capsys.readouterr().err


def test_transformers_still_draws_its_bar_by_that_name():
    assert "tqdm(reader.tensors" in inspect.getsource(reader)
