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
# A thought without content, as <think>\n\n</think> or [THINK][/THINK].
_EMPTY_THOUGHT = re.compile(r"\s*(?:<([\w:]+)>\s*</\1>|\[([A-Z]+)\]\s*\[/\2\])\s*")
_THOUGHT_IS_OVER = re.compile(r"</(?:\w+:)?think(?:ing)?>\s*$")


@dataclass(frozen=True, slots=True)
class TemplateFindings:
    """The behaviour of a template with its arguments."""

    opening: str  # mark of a thought that the generation prompt begins, such as "<think>"; empty: none
    closing: str  # mark that ends this thought
    forbids_thought: bool  # the generation prompt holds a thought that is over, so the answer comes without
    lacking: str  # end of the generation prompt that a rendered answer lacks
    empty_thought: str  # thought without content that begins a rendered answer which has no thought
    ending: str  # text after the content of the last answer
    later_ending: str  # text after the content of an answer that a user's turn follows
    keeps_space: bool  # white space around an answer's content is rendered
    renders_thought: bool  # a thought given apart from the content is rendered in the last answer
    keeps_thought: bool  # and in an answer that a user's turn follows
    renders_system: bool

    def lines(self) -> list[str]:
        """A sentence for each finding."""
        lines = [f"an answer ends with {self.ending!r}" if self.ending else "no text follows an answer"]
        if self.opening:
            lines.append(f"the generation prompt opens a thought with {self.opening}: answers must have one")
        if self.forbids_thought:
            lines.append("the generation prompt holds an empty thought: answers must have none")
        if self.empty_thought:
            lines.append("an answer without a thought is rendered with an empty one, which is not supervised")
        if self.renders_thought and not self.keeps_thought:
            lines.append("the thoughts of earlier answers are dropped: each answer is a sample of its own")
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
    shared = next(
        (index for index, pair in enumerate(zip(prompt, before, strict=False)) if pair[0] != pair[1]),
        min(len(prompt), len(before)),
    )
    thoughtful = Message("assistant", _ANSWER, thought=_THOUGHT)
    with_thought = _render_or_nothing(render, _QUESTION, thoughtful)
    mark = _OPENING_MARK.search(prompt)
    return TemplateFindings(
        opening=mark[0].strip() if mark else "",
        closing=(f"</{mark[1]}>" if mark[1] else f"[/{mark[2]}]") if mark else "",
        forbids_thought=_THOUGHT_IS_OVER.search(prompt) is not None,
        lacking=prompt[shared:],
        empty_thought=_empty_thought(before[shared:], with_thought[shared:].partition(_ANSWER)[0]),
        ending=ending,
        later_ending=_render_or_nothing(
            render, _QUESTION, Message("assistant", _ANSWER), _QUESTION
        ).partition(_ANSWER)[2],
        keeps_space=f"  {_ANSWER}  "
        in _render_or_nothing(render, _QUESTION, Message("assistant", f"  {_ANSWER}  ")),
        renders_thought=_THOUGHT in with_thought,
        keeps_thought=_THOUGHT in _render_or_nothing(render, _QUESTION, thoughtful, _QUESTION),
        renders_system=_SYSTEM.content in _render_or_nothing(render, _SYSTEM, _QUESTION),
    )


def _render_or_nothing(render: Render, *messages: Message) -> str:
    """The rendering; empty if the template refuses the chat, as many refuse a system turn."""
    try:
        return render(messages)
    except RecordProblem:
        return ""


def _empty_thought(lead: str, lead_with_thought: str) -> str:
    """`lead`, the text between prompt and answer, if it is a thought without content; else empty."""
    without_space = "".join(lead.split())
    emptied = "".join(lead_with_thought.replace(_THOUGHT, "").split())
    is_thought = _THOUGHT in lead_with_thought and emptied == without_space
    return lead if without_space and (is_thought or _EMPTY_THOUGHT.fullmatch(lead)) else ""
