"""Tools and tool calls of a record, in the form of OpenAI's chat completions, which templates read.

A null inside them counts as absent: a union of columns writes one for each key of the other records. Only a
JSON text of arguments keeps its nulls.
"""

import json
from typing import Any

from eagle_rpc.data.problems import RecordProblem, shown

# Keys of a JSON schema whose null is a value.
_NULL_IS_A_VALUE = ("default", "const")


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Descriptions of functions, given as a list or as its JSON text. Raises `RecordProblem`."""
    tools = decoded(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordProblem(f"tools must be a list of objects, got {shown(value)}", kind="of a wrong type")
    return [_wrapped(_without_nulls(tool), "tools") for tool in tools]


def parse_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls of functions: a list, one call, or the JSON text of either. `name` says where they stand.

    Arguments in JSON become objects, as templates expect them. Raises `RecordProblem`.
    """
    calls = decoded(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RecordProblem(f"{name} must be a list of calls, got {shown(value)}", kind="of a wrong type")
    return [_parse_call(call, name) for call in calls]


def decoded(value: Any) -> Any:
    """The content of a text that is a JSON list or object, as tables store nested values; else `value`."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _parse_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    call = _wrapped({key: value for key, value in call.items() if value is not None}, name)
    function = {key: value for key, value in call["function"].items() if value is not None}
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = _without_nulls(arguments)
    elif arguments is None or not str(arguments).strip():
        arguments = {}
    else:
        arguments = decoded(arguments)
    if not isinstance(arguments, dict):
        raise RecordProblem(
            f"{name} must have a JSON object as arguments, got {shown(arguments)}", kind="of a wrong type"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _wrapped(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """A tool or a call as `{"type": "function", "function": {"name": ..., ...}}`."""
    if "function" not in entry and "name" in entry:
        entry = {"type": "function", "function": entry}
    function = entry.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordProblem(
            f"{name} must name a function in each entry, got {shown(entry)}", kind="of a wrong type"
        )
    return entry


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in _NULL_IS_A_VALUE
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
