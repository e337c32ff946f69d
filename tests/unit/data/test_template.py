import pytest
from support.tiny_tokenizer import CHATML, make_tiny_tokenizer

from eagle_rpc.data import ChatTemplate, Message
from eagle_rpc.errors import ConfigError, DataError

CHAT = [
    Message("user", "hello"),
    Message("assistant", "hi there"),
    Message("user", "and you?"),
    Message("assistant", "fine"),
]

MARKED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Adds what only the last answer has, as templates of thinking models do.
UNSTABLE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def supervised_text(template, messages):
    """The supervised stretches of a chat as text."""
    ids, mask = template.supervised_ids(messages)
    assert len(ids) == len(mask)
    stretches, previous = [], False
    for token_id, supervised in zip(ids, mask, strict=True):
        if supervised:
            stretches += [] if previous else [[]]
            stretches[-1].append(token_id)
        previous = supervised
    return [template.tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("chat_template", [CHATML, MARKED], ids=["by prefix", "by markers"])
def test_content_and_end_of_turn_of_every_answer_are_supervised_and_nothing_else(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    assert supervised_text(template, CHAT) == ["hi there<|im_end|>", "fine<|im_end|>"]


def test_both_ways_to_find_the_answers_agree_token_for_token():
    by_prefix, by_markers = (
        ChatTemplate(make_tiny_tokenizer(CHATML)),
        ChatTemplate(make_tiny_tokenizer(MARKED)),
    )
    for content in (
        "hi",
        "ends with a line\n",
        "  spaces  ",
        "\u4f60\u597d \U0001f600",
        "says <|im_end|> itself",
    ):
        chat = [*CHAT, Message("user", "again"), Message("assistant", content)]
        assert by_prefix.supervised_ids(chat) == by_markers.supervised_ids(chat)


def test_ids_are_those_of_the_whole_rendering_up_to_the_last_supervised_token():
    tokenizer = make_tiny_tokenizer()
    dicts = [{"role": message.role, "content": message.content} for message in CHAT]
    whole = tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=True)["input_ids"]
    ids, mask = ChatTemplate(tokenizer).supervised_ids(CHAT)
    assert whole[: len(ids)] == ids
    assert tokenizer.decode(whole[len(ids) :]) == "\n"
    assert mask[-1]


@pytest.mark.parametrize("chat_template", [CHATML, MARKED], ids=["by prefix", "by markers"])
def test_turns_after_the_last_answer_are_left_out(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    assert template.supervised_ids([*CHAT, Message("user", "bye")]) == template.supervised_ids(CHAT)


def test_a_prompt_is_what_the_answer_follows():
    template = ChatTemplate(make_tiny_tokenizer())
    prompt = template.prompt_ids(CHAT[:1])
    ids, mask = template.supervised_ids(CHAT[:2])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def test_a_turn_without_a_special_token_at_its_end_is_supervised_whole():
    template = ChatTemplate(make_tiny_tokenizer(PLAIN))
    assert supervised_text(template, CHAT) == ["hi there\n", "fine\n"]


def test_a_prompt_whose_last_token_merges_with_the_answer_is_refused():
    template = ChatTemplate(make_tiny_tokenizer(PLAIN.replace(":\n", ": ")))
    assert len(template.tokenizer.tokenize(" the")) == 1
    with pytest.raises(DataError, match="message 2 differently"):
        template.supervised_ids([Message("user", "hello"), Message("assistant", "the sea")])


def test_a_template_that_is_not_prefix_stable_is_refused_only_where_it_matters():
    template = ChatTemplate(make_tiny_tokenizer(UNSTABLE))
    assert supervised_text(template, CHAT[:2]) == ["<think></think>hi there<|im_end|>"]
    with pytest.raises(DataError, match=r"message 2 differently .* \{% generation %\}"):
        template.supervised_ids(CHAT)


def test_a_refusal_of_the_template_is_a_data_error():
    alternating = (
        "{% if messages[-1].content == 'forbidden' %}{{ raise_exception('no such word') }}{% endif %}"
        + CHATML
    )
    for source in (alternating, alternating + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"):
        with pytest.raises(DataError, match="no such word"):
            ChatTemplate(make_tiny_tokenizer(source)).supervised_ids(
                [Message("user", "hello"), Message("assistant", "forbidden")]
            )


def test_markers_around_nothing_leave_no_supervised_token():
    template = ChatTemplate(
        make_tiny_tokenizer(CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    )
    with pytest.raises(DataError, match="no supervised token"):
        template.supervised_ids(CHAT)


def test_a_supervised_first_token_alone_teaches_nothing():
    answers_only = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(make_tiny_tokenizer(answers_only))
    assert supervised_text(template, [Message("user", "hello"), Message("assistant", "ab")]) == ["ab"]
    with pytest.raises(DataError, match="no supervised token"):
        template.supervised_ids([Message("user", "hello"), Message("assistant", "a")])


@pytest.mark.parametrize("chat_template", [CHATML, MARKED], ids=["by prefix", "by markers"])
def test_the_last_answer_of_a_truncated_chat_has_no_end(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    ids, mask = template.supervised_ids(CHAT)
    assert template.supervised_ids(CHAT, truncated=True) == (ids[:-1], mask[:-1])
    assert template.tokenizer.decode(ids[:-1]).endswith("fine")


def test_a_truncated_answer_loses_nothing_else_where_turns_have_no_end():
    template = ChatTemplate(make_tiny_tokenizer(PLAIN))
    assert template.supervised_ids(CHAT, truncated=True) == template.supervised_ids(CHAT)


def test_a_file_replaces_the_template_of_the_tokenizer(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED.replace("im_end", "endoftext"))
    template = ChatTemplate(make_tiny_tokenizer(None), str(path))
    assert supervised_text(template, CHAT) == ["hi there<|endoftext|>", "fine<|endoftext|>"]


def test_a_template_that_is_missing_or_does_not_render_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.chat_template .* has no chat template"):
        ChatTemplate(make_tiny_tokenizer(None))
    with pytest.raises(ConfigError, match=r"data\.chat_template must be a readable .*absent\.jinja"):
        ChatTemplate(make_tiny_tokenizer(), str(tmp_path / "absent.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}")
    with pytest.raises(ConfigError, match=r"data\.chat_template must render"):
        ChatTemplate(make_tiny_tokenizer(), str(broken))
