from eagle_rpc.answers.output import RegeneratedChat, open_answers
from eagle_rpc.config.choices import OnError
from eagle_rpc.data import KeptAnswer, Message, read_chats

ORIGIN = {"settings": {"target": "abc"}, "tokenizer": "def", "date": "2026-01-31"}
TOOLS = [{"type": "function", "function": {"name": "now"}}]


PROMPT, WHOLE = "ab12" * 16, KeptAnswer([1, 2], [3, 4])


def chat(*messages, number=0, answer=WHOLE):
    return RegeneratedChat(PROMPT, number, messages, TOOLS, [answer])


def test_written_chats_are_read_back_with_their_ids_and_appended_to(tmp_path):
    path, prompts = tmp_path / "new" / "answers.jsonl", tmp_path / "prompts.jsonl"
    hello = [Message("user", "hello", others={"name": "Ann"}), Message("assistant", "hi", thought="count")]
    strange = [Message("user", "line\u2028break \U0001f600"), Message("assistant", 'quote " and\nnewline')]
    cut = KeptAnswer([5], [6], truncated=True)
    with open_answers(path, prompts=prompts) as file:
        assert file.finished == set() and file.date is None
        file.write(chat(*hello), **ORIGIN)
        assert len(read_chats(path, on_error=OnError.fail).chats) == 1
    with open_answers(path, prompts=prompts) as file:
        assert file.finished == {(PROMPT, 0)} and file.date == "2026-01-31"
        file.write(chat(*strange, number=1, answer=cut), **ORIGIN)
    first, second = read_chats(path, on_error=OnError.fail).chats
    assert (first.messages, first.answers, first.truncated) == (hello, [WHOLE], False)
    assert (second.messages, second.answers, second.truncated) == (strange, [cut], True)
    assert first.tools == TOOLS
