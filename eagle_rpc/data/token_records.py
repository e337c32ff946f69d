"""Token ids in records: kept answers of regeneration, and chats that were tokenised elsewhere."""

from typing import Any

from eagle_rpc.data.chats import KeptAnswer
from eagle_rpc.data.problems import RecordProblem, shown
from eagle_rpc.data.tool_calls import decoded

_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
_IGNORED_LABEL = -100  # of a token without loss, as torch.nn.CrossEntropyLoss and transformers have it


def tokens_of(keys: dict[str, Any]) -> tuple[tuple[list[int], list[bool]] | None, set[str]]:
    """Ids and loss mask of a tokenised record, None without `input_ids`, and the keys that held them.

    The mask is `loss_mask` or `labels`; tokens whose `attention_mask` is 0 are padding and left out.
    Raises `RecordProblem`.
    """
    if "input_ids" not in keys:
        return None, set()
    ids = _ids(keys["input_ids"], "input_ids")
    masks = {key: _mask(keys[key], key, len(ids)) for key in _MASKS if key in keys}
    if "labels" in keys:
        masks["labels"] = _mask_of_labels(keys["labels"], ids)
    if not masks:
        raise RecordProblem("input_ids must come with loss_mask or labels", kind="without a mask")
    name, mask = next(iter(masks.items()))
    for other, its in masks.items():
        if its != mask:
            raise RecordProblem(f"{name} and {other} must agree", kind="with masks that differ")
    used = {"input_ids", *masks}
    if "attention_mask" in keys:
        used.add("attention_mask")
        attended = _mask(keys["attention_mask"], "attention_mask", len(ids))
        mask = [value for value, real in zip(mask, attended, strict=True) if real]
        ids = [token for token, real in zip(ids, attended, strict=True) if real]
    if not any(mask[1:]):
        raise RecordProblem(f"{name} must mark a token after the first one", kind="without supervised token")
    return (ids, mask), used


def kept_answers(keys: dict[str, Any], num_assistant_turns: int) -> tuple[list[KeptAnswer], str | None]:
    """The ids of each assistant turn, and the fingerprint of their tokenizer. Raises `RecordProblem`."""
    tokenizer = keys.get("tokenizer")
    if "answers" not in keys:
        return [], None
    answers = decoded(keys["answers"])
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise RecordProblem(
            "answers must be a list of objects with prompt_ids, answer_ids and truncated, "
            f"got {shown(answers)}",
            kind="of a wrong type",
        )
    if len(answers) != num_assistant_turns:
        raise RecordProblem(
            f"answers must have an entry for each of {num_assistant_turns} assistant turns, got {len(answers)}",
            kind="with other answers than turns",
        )
    if not isinstance(tokenizer, str):
        raise RecordProblem(
            f"tokenizer must name the fingerprint of the tokenizer of answers, got {shown(tokenizer)}",
            kind="of a wrong type",
        )
    return [_kept_answer(answer, number) for number, answer in enumerate(answers, start=1)], tokenizer


def _kept_answer(answer: dict[str, Any], number: int) -> KeptAnswer:
    name = f"of answer {number}"
    truncated = answer.get("truncated") or False
    if not isinstance(truncated, bool):
        raise RecordProblem(
            f"truncated {name} must be true or false, got {shown(truncated)}", kind="of a wrong type"
        )
    prompt_ids = _ids(answer.get("prompt_ids"), f"prompt_ids {name}")
    answer_ids = _ids(answer.get("answer_ids"), f"answer_ids {name}")
    return KeptAnswer(prompt_ids, answer_ids, truncated)


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not value or set(map(type, value)) != {int} or min(value) < 0:
        raise RecordProblem(
            f"{name} must be a list of token ids from 0 on, got {shown(value)}", kind="of a wrong type"
        )
    return value


def _mask(value: Any, name: str, length: int) -> list[bool]:
    if not isinstance(value, list) or not all(
        isinstance(mark, int | float) and mark in (0, 1) for mark in value
    ):
        raise RecordProblem(f"{name} must be a list of 0 and 1, got {shown(value)}", kind="of a wrong type")
    _check_length(value, name, length)
    return [bool(mark) for mark in value]


def _mask_of_labels(labels: Any, ids: list[int]) -> list[bool]:
    """A label is the token at its own place, as transformers has it, or -100."""
    if not isinstance(labels, list) or set(map(type, labels)) != {int}:
        raise RecordProblem(
            f"labels must be a list of token ids, got {shown(labels)}", kind="of a wrong type"
        )
    _check_length(labels, "labels", len(ids))
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (_IGNORED_LABEL, token):
            raise RecordProblem(
                f"labels must be -100 or equal input_ids, got {label} at position {position} beside {token}",
                kind="with labels that are not its tokens",
            )
    return [label != _IGNORED_LABEL for label in labels]


def _check_length(values: list[Any], name: str, length: int) -> None:
    if len(values) != length:
        raise RecordProblem(
            f"{name} must be as long as input_ids, {length}, got {len(values)}",
            kind="with lengths that differ",
        )
