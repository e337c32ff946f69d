"""What engines make of a draft's form: warned of at export, refused for engines that are named."""

from dataclasses import replace

import pytest
from support.documents import ROOT
from test_export import CONFIG

from eagle_rpc.config.choices import Engine
from eagle_rpc.errors import ConfigError
from eagle_rpc.serving.engines import (
    ENGINES,
    FORMS,
    ServedForm,
    Verdict,
    check_form,
    table_rows,
    warn_of_engines,
)


def served(aux_layer_ids=(1, 5, 8), target="llama", **changes) -> ServedForm:
    config = replace(CONFIG, num_aux_layers=len(aux_layer_ids), **changes)
    return ServedForm(config=config, aux_layer_ids=aux_layer_ids, num_target_layers=12, target=target)


EXAMPLES = [
    served(norm_before_residual=True),
    served(sliding_window=64, num_layers=2),
    served(fc_norm=True, norm_output=True, norm_before_fc=True),
    served((3,)),
    replace(served(), own_embedding=True),
    served((0, 3, 8), target="DeepseekV3ForCausalLM"),
]


def test_every_engine_serves_the_default_form(caplog):
    check_form(served(), list(Engine))
    for target in ("LlamaForCausalLM", "deepseek_v3"):
        warn_of_engines(served(target=target), [])
    assert caplog.text == ""


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("verdict", Verdict)
def test_each_rule_of_the_table_is_told(engine, verdict, caplog):
    rules = [rule for rule in ENGINES[engine].rules if rule.verdict is verdict]
    for rule in rules:
        form = next(example for example in EXAMPLES if FORMS[rule.form](example))
        caplog.clear()
        warn_of_engines(form, [])
        expected = f"{ENGINES[engine].name} {verdict.value} {rule.form}"
        assert expected in caplog.text
        if verdict in (Verdict.ignores, Verdict.refuses):
            with pytest.raises(ConfigError, match=r"^serving\.engines must") as told:
                check_form(form, [engine])
            assert expected in str(told.value)


def test_what_an_engine_can_be_told_is_not_refused():
    check_form(served(sliding_window=64), [Engine.sglang])
    check_form(served((0, 3, 8)), [Engine.tensorrt_llm])
    check_form(served(fc_norm=True, norm_output=True), [Engine.vllm, Engine.sglang, Engine.tensorrt_llm])


def test_engines_that_are_not_named_are_not_told_of(caplog):
    form = served(norm_before_residual=True)
    check_form(form, [])
    check_form(form, [Engine.vllm])
    warn_of_engines(form, [Engine.vllm])
    assert caplog.text == ""


def test_the_documents_show_the_table():
    page = (ROOT / "docs" / "drafts.md").read_text()
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table_rows())
    assert lines in page, lines
    for facts in ENGINES.values():
        assert f"| {facts.name} | {facts.version} | [" in page
        assert f"{facts.version}/{facts.file}) |" in page
