"""Where a template puts a user's content."""

import pytest
from support.chat_templates import FAMILIES, Family, tokenizer_of, turns

from eagle_rpc.data import ChatTemplate, Message
from eagle_rpc.errors import ConfigError


def template_of(family: Family) -> ChatTemplate:
    tokenizer = tokenizer_of(family)
    return ChatTemplate(tokenizer, stop_token_ids=[tokenizer.convert_tokens_to_ids(family.end)])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_prompt_of_a_question_is_the_header_the_question_and_the_end(family: Family):
    template = template_of(family)
    turn, decode = template.user_turn(), template.tokenizer.decode
    whole = decode(template.prompt_ids([Message("user", "why is the sea blue?")]))
    asked = f"{decode(turn.prompt_ids)} why is the sea blue? {decode([turn.end_id])}"
    assert "".join(whole.split()).startswith("".join(asked.split()))
    assert turn.end_text is None


def test_a_turn_that_no_token_ends_is_ended_by_the_text_after_it():
    source = turns("m.role | upper + ': ' + m.content + ' '", "ASSISTANT:")
    turn = template_of(Family(source, "<eos>")).user_turn()
    assert (turn.end_id, turn.end_text) == (None, "ASSISTANT:")


def test_a_space_before_the_content_belongs_to_its_first_word():
    template = template_of(Family(turns("'[U] ' + m.content + '[E]'", "[A]"), "[E]"))
    assert template.tokenizer.decode(template.user_turn().prompt_ids) == "[U]"


def test_the_system_prompt_stands_before_the_header():
    template = template_of(FAMILIES["SmolLM2"])
    text = template.tokenizer.decode(template.user_turn("Ask about fish.").prompt_ids)
    assert text == "<|im_start|>system\nAsk about fish.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("source", "system", "message"),
    [
        (turns("m.content + '<E>'", "[A]"), "", "header before a user's content, got none"),
        (
            turns("'[U]' + m.content + (m.content if m.role == 'user' else '') + '<E>'", "[A]"),
            "",
            "writes the content 2 times",
        ),
        (turns("'[U]' + m.content | first + m.content + '<E>'", "[A]"), "", "depends on the content"),
        (FAMILIES["Gemma-2"].source, "Be kind.", "prompts.system cannot be used.*System role not supported"),
    ],
    ids=["no header", "twice", "depends", "no system role"],
)
def test_a_header_that_cannot_be_found_is_refused_in_words(source: str, system: str, message: str):
    template = template_of(Family(source, "<E>"))
    with pytest.raises(ConfigError, match=message):
        template.user_turn(system)
