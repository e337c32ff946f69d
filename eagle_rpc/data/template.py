"""Chats as token ids: the prompt of each answer, and the answer as the target says it.

A chat is rendered as a server renders it: the prompt of an answer is the template's rendering of the turns
before it, with the generation prompt. A template may render an earlier answer in another way than it was said
(Qwen3's drops thoughts); `samples_of` then makes several samples of one chat. Answers whose ids were kept
when the target gave them are not rendered at all.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from eagle_rpc.data.chats import Chat, KeptAnswer, Message
from eagle_rpc.data.pieces import PieceTokeniser
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.data.rendering import ChatRenderer
from eagle_rpc.data.samples import Sample, samples_of
from eagle_rpc.data.template_check import check_template
from eagle_rpc.data.user_turn import UserTurn, find_user_turn
from eagle_rpc.supervision.fingerprint import tokenizer_fingerprint

_THOUGHT_BEGINS = re.compile(r"\s*<(?:\w+:)?think(?:ing)?>")
_MARK = re.compile(r"</?\w+>|\[/?[A-Z]+\]")


class ChatTemplate:
    """A tokenizer, its chat template, and the arguments of every rendering.

    `findings` says what the template does; `identity` is a hash of all that token ids depend on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        """`path` is a Jinja file that replaces the tokenizer's template.

        `date` (ISO) is the day that the template writes, null: today. `stop_token_ids` end an answer; the
        first one after an answer's content is its end of turn, or else the first special token.
        Raises `ConfigError` if there is no template, if it does not render questions and answers, or if it
        reads none of `arguments`.
        """
        self.tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, path, arguments or {}, date)
        self._tokenise = PieceTokeniser(tokenizer)
        self._special_ids = special_token_ids(tokenizer)
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._stop_ids = frozenset(stop_token_ids)
        self.findings = check_template(self._renderer.text)
        self._end_of_turn = self._find_end_of_turn()

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the given ones and the end of turn that the template writes."""
        return self._stop_ids.union(self._end_of_turn[-1:])

    @property
    def end_of_turn_id(self) -> int | None:
        """The stop token that the template writes after an answer; None if it writes none."""
        return self._end_of_turn[-1] if self._end_of_turn else None

    @property
    def identity(self) -> str:
        """Hash of template, arguments, day, tokenizer and stop tokens."""
        parts = [self._renderer.identity, self._fingerprint, sorted(self._stop_ids)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of the prompt for the assistant's answer to `messages`.

        Raises `RecordProblem` if the template refuses the turns or leaves one of them out.
        """
        return self._tokenise(self._renderer.prompt(messages, tools))

    def user_turn(self, system: str = "") -> UserTurn:
        """The text around a user's first content, for a target that writes it. Raises `ConfigError`."""
        ending = self._special_ids | self.stop_token_ids
        return find_user_turn(self._renderer, self._tokenise, self._decode, ending, system)

    def samples(self, chat: Chat) -> list[Sample]:
        """The samples of a chat; at least one. Raises `RecordProblem`."""
        samples = [Sample(*chat.tokens)] if chat.tokens else samples_of(self.answers(chat))
        if not samples:
            raise RecordProblem("the chat has no supervised token", kind="without supervised token")
        return samples

    def answers(self, chat: Chat) -> Iterator[KeptAnswer]:
        """The supervised answers of a chat: the ids that were kept, or the rendering of its text.

        Raises `RecordProblem` if the template refuses the chat, renders it without a turn, or renders an
        answer that the target would not say.
        """
        if chat.answers and chat.tokenizer not in (None, self._fingerprint):
            raise RecordProblem(
                "the token ids of the answers must be of the target's tokenizer, they are of another one: "
                "let this target answer (job=regenerate)",
                kind="with token ids of another tokenizer",
            )
        indices = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
        for number, index in enumerate(indices):
            if not chat.messages[index].supervised:
                continue
            if chat.answers:
                yield chat.answers[number]
                continue
            answer = self._rendered_answer(
                chat.messages[: index + 1], chat.tools, truncated=chat.truncated and index == indices[-1]
            )
            if answer is not None:
                yield answer

    def _rendered_answer(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, truncated: bool
    ) -> KeptAnswer | None:
        """The last of `messages` as the answer to the others; None if generation markers leave it out."""
        prompt = self._renderer.prompt(messages[:-1], tools)
        prompt_ids = self._tokenise(prompt)
        if self._renderer.has_markers and not self._renderer.is_marked(messages, tools, len(prompt_ids)):
            return None
        said, has_end = self._said(prompt, messages, tools, truncated=truncated)
        said_ids = self._ids_after(prompt, prompt_ids, said)
        if has_end:
            said_ids = self._up_to_end(said_ids, included=not truncated)
        elif not truncated:
            said_ids = said_ids + self._end_of_turn
        return KeptAnswer(prompt_ids, said_ids, truncated)

    def _said(
        self, prompt: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, truncated: bool
    ) -> tuple[str, bool]:
        """The text that the target says after `prompt`, and whether it includes the end of the turn."""
        findings, answer = self.findings, messages[-1]
        self._check_answer(answer, len(messages), truncated=truncated)
        if findings.opens_thought and answer.thought is None and not answer.tool_calls:
            # The content holds the thought, or the beginning of it.
            return _without_opening(answer.content, findings.opening), False
        whole = self._renderer.text(messages, tools)
        header = prompt if whole.startswith(prompt) else prompt.removesuffix(findings.lacking)
        rest = whole[len(header) :]
        if not whole.startswith(header) or not self._is_rendered_in(answer, rest):
            return self._said_by_content(answer, len(messages)), False
        if findings.opens_thought:
            rest = _without_opening(rest, findings.opening)
        elif answer.thought is None and findings.empty_thought.strip() not in answer.content:
            rest = rest.removeprefix(findings.empty_thought)
        said = rest.removesuffix(findings.ending)
        return said, said == rest and bool(findings.ending)

    def _check_answer(self, answer: Message, number: int, *, truncated: bool) -> None:
        """Raises `RecordProblem` for a text that the target cannot say after its prompt."""
        findings = self.findings
        ends = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self._stop_ids]
        if any(end in answer.content or end in (answer.thought or "") for end in ends):
            raise RecordProblem(
                f"message {number} must not have an end of turn inside the answer",
                kind="with an end of turn inside an answer",
            )
        has_thought = answer.thought is not None or findings.closing.strip() in answer.content
        if findings.opens_thought and not truncated and not has_thought:
            raise RecordProblem(
                f"message {number} must begin with a thought, which the generation prompt opens: "
                "let the target answer (job=regenerate), or choose a prompt without it "
                "(data.template_arguments)",
                kind="without the thought that the prompt opens",
            )
        if findings.forbids_thought and (answer.thought or _THOUGHT_BEGINS.match(answer.content)):
            raise RecordProblem(
                f"message {number} must have no thought, since the generation prompt ends it: "
                "choose a prompt with thoughts (data.template_arguments)",
                kind="with a thought that the prompt forbids",
            )

    def _said_by_content(self, answer: Message, number: int) -> str:
        """An answer that the template renders without its thought, or in another place: as it was said."""
        findings = self.findings
        if answer.tool_calls:
            raise RecordProblem(
                f"message {number} has tool_calls, which the chat template does not render",
                kind="with tool calls that the template does not render",
            )
        if answer.thought is None:
            return answer.content
        if not findings.opens_thought and "</think>" not in self._renderer.source:
            raise RecordProblem(
                f"message {number} has a thought, which the chat template does not render",
                kind="with a thought that the template does not render",
            )
        thought = answer.thought + findings.closing + answer.content
        return thought if findings.opens_thought else f"{findings.opening or '<think>'}\n{thought}"

    def _is_rendered_in(self, answer: Message, rest: str) -> bool:
        """Whether `rest` shows the content of the answer with its thought and calls."""
        calls = [str(call.get("function", call).get("name", "")) for call in answer.tool_calls]
        parts = [answer.content, answer.thought or "", *calls]
        # Templates take a thought out of the content and write it elsewhere: compare it piece by piece.
        pieces = [piece.strip() for part in parts for piece in _MARK.split(part)]
        return all(piece in rest for piece in pieces)

    def _ids_after(self, prompt: str, prompt_ids: list[int], said: str) -> list[int]:
        """Token ids of `said` after a prompt, whose own ids stay as they are."""
        whole = self._tokenise(prompt + said)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # The last token of the prompt merges with the answer; a special token before it keeps them apart.
        anchor = self.tokenizer.all_special_tokens[0] if self.tokenizer.all_special_tokens else ""
        return self._tokenise(anchor + said)[len(self._tokenise(anchor)) :]

    def _up_to_end(self, ids: list[int], *, included: bool) -> list[int]:
        """An answer up to the end of its turn, from ids that may go on behind it."""
        end = next((index for index, token in enumerate(ids) if token in self._stop_ids), None)
        if end is None:
            end = len(ids)
            while end and ids[end - 1] not in self._special_ids and self._is_space(ids[end - 1]):
                end -= 1
            while end and ids[end - 1] in self._special_ids:
                end -= 1
        return ids[: end + included]

    def _find_end_of_turn(self) -> list[int]:
        """The ids that end an answer: up to the first stop token that the template writes after it."""
        for text in (self.findings.ending, self.findings.later_ending):
            ids = self._tokenise(text) if text else []
            for ends in (self._stop_ids, self._special_ids):
                found = next((index for index, token in enumerate(ids) if token in ends), None)
                if found is not None:
                    return ids[: found + 1]
        return []

    def _is_space(self, token_id: int) -> bool:
        return self._decode([token_id]).isspace()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


def _without_opening(text: str, opening: str) -> str:
    """An answer without the mark that its prompt ends with already."""
    return re.sub(rf"^\s*{re.escape(opening)}\n?", "", text) if opening else text


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: those with a role, and added tokens with the flag `special`."""
    flagged = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return flagged.union(tokenizer.all_special_ids)
