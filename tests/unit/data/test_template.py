import pytest
from support.tiny_tokenizer import CHATML, make_tiny_tokenizer

from eagle_rpc.data import Chat, ChatTemplate, KeptAnswer, Message, Sample
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

# Adds an empty thought to the last answer alone, as templates of thinking models do.
UNSTABLE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def samples(template, messages, **chat):
    return template.samples(Chat(list(messages), 1, **chat))


def one_sample(template, messages, **chat):
    (sample,) = samples(template, messages, **chat)
    return sample


def supervised_text(template, messages):
    """The supervised stretches of a chat as text."""
    stretches = []
    for sample in samples(template, messages):
        previous = False
        for token_id, supervised in zip(sample.ids, sample.mask, strict=True):
            if supervised:
                stretches += [] if previous else [[]]
                stretches[-1].append(token_id)
            previous = supervised
    return [template.tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("chat_template", [CHATML, MARKED], ids=["by prefix", "by markers"])
def test_content_and_end_of_turn_of_every_answer_are_supervised_and_nothing_else(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    assert supervised_text(template, CHAT) == ["hi there<|im_end|>", "fine<|im_end|>"]


def test_markers_and_their_absence_give_the_same_samples():
    plain, marked = (ChatTemplate(make_tiny_tokenizer(source)) for source in (CHATML, MARKED))
    contents = ("hi", "ends with a line\n", "  spaces  ", "\u4f60\u597d \U0001f600", "says <|im_end|> itself")
    for content in contents:
        chat = [*CHAT, Message("user", "again"), Message("assistant", content)]
        assert samples(plain, chat) == samples(marked, chat)


def test_an_answer_with_a_stop_token_inside_is_refused():
    template = ChatTemplate(make_tiny_tokenizer(), stop_token_ids=[2])
    with pytest.raises(DataError, match="message 2 must not have an end of turn inside"):
        samples(template, [Message("user", "hello"), Message("assistant", "says <|im_end|> itself")])


def test_ids_are_those_of_the_whole_rendering_up_to_the_last_supervised_token():
    tokenizer = make_tiny_tokenizer()
    dicts = [{"role": message.role, "content": message.content} for message in CHAT]
    whole = tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=True)["input_ids"]
    sample = one_sample(ChatTemplate(tokenizer), CHAT)
    assert whole[: len(sample.ids)] == sample.ids
    assert tokenizer.decode(whole[len(sample.ids) :]) == "\n"
    assert sample.mask[-1]


@pytest.mark.parametrize("chat_template", [CHATML, MARKED], ids=["by prefix", "by markers"])
def test_turns_after_the_last_answer_are_left_out(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    assert samples(template, [*CHAT, Message("user", "bye")]) == samples(template, CHAT)


def test_a_prompt_is_what_the_answer_follows():
    template = ChatTemplate(make_tiny_tokenizer())
    prompt = template.prompt_ids(CHAT[:1])
    sample = one_sample(template, CHAT[:2])
    assert sample.ids[: len(prompt)] == prompt
    assert sample.mask.index(True) == len(prompt)


PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def test_text_that_no_target_is_known_to_emit_is_not_supervised_after_an_answer():
    template = ChatTemplate(make_tiny_tokenizer(PLAIN))
    assert supervised_text(template, CHAT) == ["hi there", "fine"]


def test_a_prompt_keeps_its_ids_where_its_last_token_would_merge_with_the_answer():
    template = ChatTemplate(make_tiny_tokenizer(PLAIN.replace(":\n", ": ")))
    assert len(template.tokenizer.tokenize(" the")) == 1
    chat = [Message("user", "hello"), Message("assistant", "the sea")]
    prompt = template.prompt_ids(chat[:1])
    assert one_sample(template, chat).ids[: len(prompt)] == prompt
    assert supervised_text(template, chat) == ["the sea"]


def test_an_empty_thought_that_the_template_adds_is_not_supervised():
    template = ChatTemplate(make_tiny_tokenizer(UNSTABLE))
    assert supervised_text(template, CHAT) == ["hi there<|im_end|>", "fine<|im_end|>"]


def test_a_refusal_of_the_template_is_a_data_error():
    alternating = (
        "{% if messages[-1].content == 'forbidden' %}{{ raise_exception('no such word') }}{% endif %}"
        + CHATML
    )
    for source in (alternating, alternating + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"):
        with pytest.raises(DataError, match="no such word"):
            samples(
                ChatTemplate(make_tiny_tokenizer(source)),
                [Message("user", "hello"), Message("assistant", "forbidden")],
            )


def test_markers_around_nothing_leave_no_supervised_token():
    template = ChatTemplate(
        make_tiny_tokenizer(CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    )
    with pytest.raises(DataError, match="no supervised token"):
        samples(template, CHAT)


def test_answers_that_the_record_excludes_are_context_only():
    chat = [CHAT[0], Message("assistant", "wrong", supervised=False), *CHAT[2:]]
    template = ChatTemplate(make_tiny_tokenizer())
    assert supervised_text(template, chat) == ["fine<|im_end|>"]
    with pytest.raises(DataError, match="no supervised token"):
        samples(template, chat[:2])


@pytest.mark.parametrize(
    "chat_template", [CHATML, MARKED, CHATML.replace("'<|im_end|>'", "'<|im_end|><|endoftext|>'")]
)
def test_the_last_answer_of_a_truncated_chat_has_no_end(chat_template):
    template = ChatTemplate(make_tiny_tokenizer(chat_template))
    sample, cut = one_sample(template, CHAT), one_sample(template, CHAT, truncated=True)
    assert (cut.ids, cut.mask) == (sample.ids[:-1], sample.mask[:-1])
    assert template.tokenizer.decode(cut.ids).endswith("fine")


def test_kept_ids_are_trained_as_they_are():
    template = ChatTemplate(make_tiny_tokenizer())
    first = KeptAnswer([1, 10, 11], [20, 2])
    goes_on = KeptAnswer([1, 10, 11, 20, 2, 12], [21], truncated=True)
    another = KeptAnswer([1, 10, 13], [22, 2])
    two = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    assert samples(template, two, answers=[first, goes_on]) == [
        Sample([1, 10, 11, 20, 2, 12, 21], [False] * 3 + [True] * 2 + [False, True])
    ]
    assert samples(template, two, answers=[first, another]) == [
        Sample([1, 10, 11, 20, 2], [False] * 3 + [True] * 2),
        Sample([1, 10, 13, 22, 2], [False] * 3 + [True] * 2),
    ]


def test_tokens_of_a_record_are_trained_as_they_are():
    tokens = ([5, 6, 7], [False, True, True])
    assert samples(ChatTemplate(make_tiny_tokenizer()), [], tokens=tokens) == [Sample(*tokens)]


def test_a_developer_turn_is_the_system_turn_of_a_template_that_knows_no_other():
    turns = [Message("developer", "be brief"), *CHAT[:2]]
    as_system = [Message("system", "be brief"), *CHAT[:2]]
    template = ChatTemplate(make_tiny_tokenizer())
    assert samples(template, turns) == samples(template, as_system)
    knows = CHATML.replace(
        "message['role'] +", "('developer' if message.role == 'developer' else message.role) +", 1
    )
    assert "developer" in ChatTemplate(make_tiny_tokenizer(knows)).tokenizer.decode(
        samples(ChatTemplate(make_tiny_tokenizer(knows)), turns)[0].ids
    )


def test_keys_of_a_turn_reach_a_template_that_reads_them_and_are_refused_where_they_would_count():
    named = CHATML.replace("message['content']", "(message.name or '') + message['content']")
    turns = [Message("user", "hello", others={"name": "Ann: "}), CHAT[1]]
    template = ChatTemplate(make_tiny_tokenizer(named))
    assert "Ann: hello" in template.tokenizer.decode(one_sample(template, turns).ids)
    plain = ChatTemplate(make_tiny_tokenizer())
    assert one_sample(plain, turns) == one_sample(plain, CHAT[:2])
    masked = [CHAT[0], Message("assistant", "hi there", others={"loss_mask": [0]})]
    with pytest.raises(DataError, match="message 2 has the key loss_mask"):
        samples(plain, masked)


def test_a_turn_that_the_template_leaves_out_is_refused():
    without_system = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    template = ChatTemplate(make_tiny_tokenizer(without_system))
    with pytest.raises(DataError, match=r"message 1 \(system\) is not rendered"):
        samples(template, [Message("system", "be brief"), *CHAT])


def test_arguments_reach_every_rendering_and_unknown_ones_are_refused():
    polite = CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('Sir, ' if polite else '')"
    )
    plain, arguments = ChatTemplate(make_tiny_tokenizer(polite)), {"polite": True}
    template = ChatTemplate(make_tiny_tokenizer(polite), arguments=arguments)
    assert template.tokenizer.decode(template.prompt_ids(CHAT[:1])).endswith("Sir, ")
    assert template.identity != plain.identity
    with pytest.raises(ConfigError, match=r"data\.template_arguments\.pollite must be a variable"):
        ChatTemplate(make_tiny_tokenizer(polite), arguments={"pollite": True})


def test_a_template_that_writes_the_date_writes_the_given_one():
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y, %A, %-d.%-m.') + '\n' }}" + CHATML
    template, later = (
        ChatTemplate(make_tiny_tokenizer(dated), date=date) for date in ("2026-02-03", "2026-02-04")
    )
    assert "Today: 03 Feb 2026, Tuesday, 3.2.\n" in template.tokenizer.decode(template.prompt_ids(CHAT[:1]))
    assert template.identity != later.identity
    undated, other = (ChatTemplate(make_tiny_tokenizer(), date=date) for date in ("2026-02-03", "2026-02-04"))
    assert undated.identity == other.identity


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
    with pytest.raises(ConfigError, match=r"data\.chat_template must render a question and an answer"):
        ChatTemplate(make_tiny_tokenizer(), str(broken))
