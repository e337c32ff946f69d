"""Templates in the forms of well-known models: training ids are prompt ids plus said ids, or a refusal."""

import datetime

import pytest
from support.chat_templates import FAMILIES, Family, tokenizer_of

from eagle_rpc.data import Chat, ChatTemplate, Message
from eagle_rpc.data.problems import RecordProblem

DAY = "2026-01-31"
QUESTION, AGAIN = Message("user", "what is the sea?"), Message("user", "and why?")
TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
]
CALL = Message(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "now", "arguments": {}}}]
)


def said(content, thought=None, inline=None):
    return Message("assistant", inline or content, thought=thought)


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def template(family) -> ChatTemplate:
    tokenizer = tokenizer_of(family)
    stop = tokenizer.convert_tokens_to_ids(family.end)
    return ChatTemplate(tokenizer, date=DAY, stop_token_ids=[stop])


def prompt_ids(template, messages, **options):
    """The prompt as a server makes it: transformers' rendering, on the day of the run."""
    source = template.tokenizer.chat_template.replace(
        "strftime_now('%d %b %Y')", repr(datetime.date.fromisoformat(DAY).strftime("%d %b %Y"))
    )
    turns = [
        {"role": m.role, "content": m.content}
        | ({"tool_calls": m.tool_calls} if m.tool_calls else {})
        | ({"reasoning_content": m.thought} if m.thought else {})
        for m in messages
    ]
    text = template.tokenizer.apply_chat_template(
        turns, chat_template=source, add_generation_prompt=True, tokenize=False, **options
    )
    return ids_of(template, text)


def ids_of(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def supervised(template, chat):
    """Each supervised stretch of the samples of a chat, and the ids before it."""
    stretches = []
    for sample in template.samples(chat):
        starts = [i for i, now in enumerate(sample.mask) if now and not sample.mask[i - 1]]
        for start in starts:
            stop = start
            while stop < len(sample.mask) and sample.mask[stop]:
                stop += 1
            stretches.append((sample.ids[:start], sample.ids[start:stop]))
    return stretches


def check(template, chat, expected):
    """`expected`: the text that is said as each answer, None where the chat has to be refused."""
    indices = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    tools = {"tools": chat.tools} if chat.tools else {}
    assert supervised(template, chat) == [
        (prompt_ids(template, chat.messages[:index], **tools), ids_of(template, text))
        for index, text in zip(indices, expected, strict=True)
    ]


def refused(template, chat, reason):
    with pytest.raises(RecordProblem, match=reason):
        template.samples(chat)


def test_answers_follow_the_prompts_that_a_server_makes(family, template):
    chat = Chat([QUESTION, said("deep."), AGAIN, said("it is.")], 1)
    if family.answer is None:
        refused(template, chat, "must begin with a thought")
    else:
        check(template, chat, [family.answer.format(A=text) + family.end for text in ("deep.", "it is.")])


def test_a_system_turn_is_rendered_or_the_chat_is_refused(family, template):
    chat = Chat(
        [Message("system", "be brief."), QUESTION, said("deep.", thought="T" if not family.answer else None)],
        1,
    )
    form = family.answer or family.thinking
    if family.system:
        check(template, chat, [form.format(A="deep.", T="T") + family.end])
    else:
        refused(template, chat, family.reason)


def test_a_cut_answer_has_no_end(family, template):
    if family.answer is not None:
        form = family.answer.partition("{A}")[0] + "{A}"
        check(template, Chat([QUESTION, said("deep and")], 1, truncated=True), [form.format(A="deep and")])


def test_a_thought_apart_from_the_answer_is_said_or_the_chat_is_refused(family, template):
    chat = Chat([QUESTION, said("deep.", thought="count")], 1)
    if family.thinking is None:
        refused(template, chat, "thought")
    else:
        check(template, chat, [family.thinking.format(A="deep.", T="count") + family.end])


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if "<think>" in FAMILIES[name].source and FAMILIES[name].thinking]
)
def test_a_thought_inside_the_answer_is_said_with_its_own_white_space(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer, stop_token_ids=[tokenizer.convert_tokens_to_ids(family.end)])
    inline = said("", inline="<think>\ncount\n</think>\n\ndeep.")
    check(template, Chat([QUESTION, inline], 1), [family.thinking.format(A="deep.", T="count") + family.end])
    cut = said("", inline="<think>\ncount and")
    opened = "" if family.answer is None else "<think>\n"
    check(template, Chat([QUESTION, cut], 1, truncated=True), [opened + "count and"])


def test_calls_are_said_and_results_are_not_or_the_chat_is_refused(family, template):
    result = Message("tool", "12:00", others={"tool_call_id": "1"})
    chat = Chat([QUESTION, CALL, result, said("noon.")], 1, tools=TOOLS)
    if family.calls is None:
        refused(template, chat, family.reason)
    else:
        check(template, chat, [family.calls, family.answer.format(A="noon.") + family.end])


def test_nothing_after_the_end_of_turn_is_supervised(family, template):
    form = family.answer or family.thinking
    chat = Chat([QUESTION, said("deep.", thought=None if family.answer else "T"), AGAIN], 1)
    (sample,) = template.samples(chat)
    assert template.tokenizer.decode(sample.ids).endswith(form.format(A="deep.", T="T") + family.end)
    assert sample.mask[-1]
