"""The behaviour of a chat template, found by rendering chats of marker words.

From it the answers of text chats become what the target says. It stands in the log at the start of a job.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from eagle_rpc.data.chats import Message
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.errors import ConfigError

Render = Callable[..., str]  # messages, add_generation_prompt=False -> text; raises RecordProblem

_SYSTEM, _QUESTION = Message("system", "Zebrasystem"), Message("user", "Zebraquestion")
_ANSWER, _THOUGHT = "Zebraanswer", "Zebrathought"
_OPENING_MARK = re.compile(r"(?:<([\w:]+)>|\[([A-Z]+)\])\s*$")
# A thought without content, as <think>\n\n</think>, [THINK][/THINK] or </think> alone.
_EMPTY_THOUGHT = re.compile(r"\s*(?:<([\w:]+)>\s*</\1>|\[([A-Z]+)\]\s*\[/\2\]|</[\w:]+>)\s*")
_MARK_BEGINS = re.compile(r"(?:<|\[)[^<>\[\]]*$")
_THOUGHT_IS_OVER = re.compile(r"</(?:\w+:)?think(?:ing)?>\s*$")


@dataclass(frozen=True, slots=True)
class TemplateFindings:
    """The behaviour of a template with its arguments."""

    opens_thought: bool  # the generation prompt begins a thought
    opening: str  # mark that begins a thought, such as "<think>"; empty: not known
    closing: str  # text between a thought and the content, such as "\n</think>\n\n"
    forbids_thought: bool  # the generation prompt holds a thought that is over, so the answer comes without
    lacking: str  # end of the generation prompt that a rendered answer lacks
    empty_thought: str  # thought without content that begins a rendered answer which has no thought
    ending: str  # text after the content of the last answer
    later_ending: str  # text after the content of an answer that a user's turn follows
    keeps_space: bool  # white space around an answer's content is rendered
    keeps_answers: bool  # an answer is rendered as it was said when a user's turn follows
    renders_system: bool

    def lines(self) -> list[str]:
        """A sentence for each finding."""
        lines = [f"an answer ends with {self.ending!r}" if self.ending else "no text follows an answer"]
        if self.opens_thought:
            lines.append(f"the generation prompt opens a thought {self.opening}: answers must have one")
        if self.forbids_thought:
            lines.append("the generation prompt holds an empty thought: answers must have none")
        if self.empty_thought:
            lines.append("an answer without a thought is rendered with an empty one, which is not supervised")
        if not self.keeps_answers:
            lines.append("earlier answers are rendered unlike they were said: each is a sample of its own")
        if not self.keeps_space:
            lines.append("white space around an answer is trimmed")
        if not self.renders_system:
            lines.append("a system turn is refused or left out")
        return lines


def check_template(render: Render) -> TemplateFindings:
    """Renders chats of marker words. Raises `ConfigError` if questions or answers do not come back."""
    try:
        prompt = render([_QUESTION], add_generation_prompt=True)
        turn = render([_QUESTION, Message("assistant", _ANSWER)])
    except RecordProblem as problem:
        raise ConfigError(
            f"data.chat_template must render a question and an answer, got: {problem}"
        ) from problem
    if _QUESTION.content not in prompt or turn.count(_ANSWER) != 1:
        raise ConfigError(
            "data.chat_template must render the text of a question and of an answer once, "
            f"got the prompt {prompt!r:.200} and the answer {turn!r:.200}"
        )
    before, ending = turn.split(_ANSWER)
    shared = _shared_length(prompt, before)
    lacking, lead = prompt[shared:], before[shared:]
    plain, thoughtful = Message("assistant", _ANSWER), Message("assistant", _ANSWER, thought=_THOUGHT)
    with_thought = _render_or_nothing(render, _QUESTION, thoughtful).partition(_ANSWER)[0]
    renders_thought = _THOUGHT in with_thought
    thought_lead, _, closing = with_thought[shared:].partition(_THOUGHT) if renders_thought else ("", "", "")
    mark = _OPENING_MARK.search(prompt)
    # The prompt has more than a rendered answer has before its thought, or as much as it has.
    has_more = bool(lacking.strip() or lead.strip()) and thought_lead.strip() in ("", lacking.strip())
    opens = mark is not None or (renders_thought and has_more)
    empty_thought = "" if opens else _empty_thought(lead, thought_lead + closing)
    said = with_thought.removeprefix(prompt) if renders_thought else lead.removeprefix(empty_thought)
    answer = thoughtful if renders_thought else plain
    return TemplateFindings(
        opens_thought=opens,
        opening=mark[0].strip() if mark else thought_lead.strip(),
        closing=closing or _closing_of(mark),
        forbids_thought=_THOUGHT_IS_OVER.search(prompt) is not None,
        lacking=lacking,
        empty_thought=empty_thought,
        ending=ending,
        later_ending=_render_or_nothing(render, _QUESTION, plain, _QUESTION).partition(_ANSWER)[2],
        keeps_space=f"  {_ANSWER}  "
        in _render_or_nothing(render, _QUESTION, Message("assistant", f"  {_ANSWER}  ")),
        keeps_answers=_render_or_nothing(render, _QUESTION, answer, _QUESTION).startswith(
            prompt + said + _ANSWER
        ),
        renders_system=_SYSTEM.content in _render_or_nothing(render, _SYSTEM, _QUESTION),
    )


def _shared_length(prompt: str, before: str) -> int:
    """Length of the common beginning of a prompt and a rendered turn that does not end inside a mark."""
    length = next(
        (index for index, pair in enumerate(zip(prompt, before, strict=False)) if pair[0] != pair[1]),
        min(len(prompt), len(before)),
    )
    inside_mark = _MARK_BEGINS.search(prompt[:length]) if length < len(prompt) else None
    return inside_mark.start() if inside_mark else length


def _closing_of(mark: re.Match[str] | None) -> str:
    """The text that ends the thought which a mark begins, in the usual form."""
    if mark is None:
        return "\n</think>\n\n"
    return f"\n</{mark[1]}>\n\n" if mark[1] else f"[/{mark[2]}]"


def _render_or_nothing(render: Render, *messages: Message) -> str:
    """The rendering; empty if the template refuses the chat, as many refuse a system turn."""
    try:
        return render(messages)
    except RecordProblem:
        return ""


def _empty_thought(lead: str, thought_marks: str) -> str:
    """`lead`, the text between prompt and answer, if it is a thought without content; else empty.

    `thought_marks` is the text around a thought in this place.
    """
    is_thought = "".join(lead.split()) == "".join(thought_marks.split()) or _EMPTY_THOUGHT.fullmatch(lead)
    return lead if lead.strip() and is_thought else ""
