"""Reads tool calls and lists of tools in the layouts that data sets use, and writes them as chat templates expect.

Templates expect the layout of OpenAI's API (`{"type": "function", "function": {"name": ..., "arguments": ...}}`) with
arguments as an object, as the chat template guide of transformers describes it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qlora.formats.format import BadRow, Row, is_empty
from qlora.formats.values import check_text, described

Call = Mapping[str, Any]


def tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    """Return the functions in a row's `tools` column: a list of schemas, or its JSON text. Raises BadRow."""
    value = _decoded(row.get("tools"), "'tools'")
    if is_empty(value):
        return ()
    check_text(value, "'tools'")
    tools = value if isinstance(value, list) else [value]
    for number, tool in enumerate(tools, 1):
        if not (isinstance(tool, Mapping) and _function(tool).get("name")):
            raise BadRow("unknown tools", f"'tools', entry {number}: must be a function with a name")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def calls_of(message: Mapping[str, Any], where: str) -> list[Call]:
    """Return the calls of a message with OpenAI's `tool_calls` and its older `function_call`. Raises BadRow."""
    given = [message[key] for key in ("function_call", "tool_calls") if not is_empty(message.get(key))]
    return [call for value in given for call in parsed_calls(value, where)]


def parsed_calls(value: Any, where: str) -> list[Call]:
    """Return the calls in a list, an object or a JSON text of calls. Raises BadRow."""
    value = _decoded(value, f"{where}the tool call")
    check_text(value, f"{where}the tool call")
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, where: str) -> Call:
    function = _function(call) if isinstance(call, Mapping) else {}
    name = function.get("name")
    if not isinstance(name, str):
        raise BadRow("unknown tool call", f"{where}must have a name and arguments, not {described(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        with suppress(ValueError):  # models do write arguments that are no JSON
            arguments = json.loads(arguments)
            check_text(arguments, f"{where}the arguments of the tool call")
    known = {
        "type": "function",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }
    return {**known, **({"id": call["id"]} if isinstance(call.get("id"), str) else {})}


def _function(value: Mapping[str, Any]) -> Mapping[str, Any]:
    function = value.get("function", value)
    return function if isinstance(function, Mapping) else {}


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow("broken JSON", f"{where}: {error}") from None
