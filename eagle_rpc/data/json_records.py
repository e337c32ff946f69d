"""Records of JSON files: one a line, elements of an array, or elements of the one list in an object.

JSON is read by the standard library in bounded memory, because the library `datasets` unites the keys of all
records of a file.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

from eagle_rpc.data.problems import Record, RecordProblem
from eagle_rpc.errors import DataError

# Enough for a chat of a million tokens; a file without line ends cannot fill the memory.
MAX_LINE_BYTES = 16 * 2**20

_CHUNK = 2**18
_DECODER = json.JSONDecoder()
# An object of a list with one of these keys is a turn, a tool or an answer, not a record.
_INSIDE_A_RECORD = frozenset({"role", "from", "function", "prompt_ids"})


class _NotJSON(Exception):
    """The text is no JSON; the message says why and where."""


def json_records(open_file: Callable[[], BinaryIO], name: str) -> Iterator[Record]:
    """Places and records of a file, which is opened more than once and called `name` in messages.

    A line that is no JSON comes as a `RecordProblem`. Raises `DataError` where an array is no JSON, because
    the place of its next record is unknown.
    """
    if not _is_lines(open_file):
        with open_file() as file:
            text, is_certain = _Text(file), False
            try:
                is_certain = text.peek() == "["
                for found in _values(text, name):
                    is_certain = True
                    yield found
                return
            except _NotJSON as error:
                if is_certain:
                    raise DataError(f"{name} must be JSON, got {error}") from error
    # Lines, the first of which may be broken.
    with open_file() as file:
        for number, raw in numbered_lines(file):
            yield f"{name}, line {number}", _parse_line(raw)


def _is_lines(open_file: Callable[[], BinaryIO]) -> bool:
    """Whether the first line is JSON by itself and more follow, or is broken and the next two are JSON."""
    with open_file() as file:
        lines = (line for _, line in numbered_lines(file))
        first, following = next(lines, b""), list(islice(lines, 2))
    if not following:
        return False
    is_whole = [not isinstance(_parse_line(line), RecordProblem) for line in (first, *following)]
    return is_whole[0] or all(is_whole[1:])


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and contents of lines that are not blank, cut to just over `MAX_LINE_BYTES`."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with this mark
        if raw.strip():
            yield number, raw


def _parse_line(raw: bytes) -> Any:
    """The value of a line, or the problem of a line that has none."""
    if len(raw) > MAX_LINE_BYTES:
        return RecordProblem(f"the line must have at most {MAX_LINE_BYTES} bytes", kind="too long")
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return RecordProblem(f"the line is {_not_utf8(error)}", kind="not UTF-8")
    except (ValueError, RecursionError) as error:
        return RecordProblem(f"the line is not JSON: {error}", kind="not JSON")


def _not_utf8(error: UnicodeDecodeError) -> str:
    """The encoding that the bytes are likely in, and the way out."""
    high = {byte for byte in error.object if byte >= 0x80}
    encoding = "cp1252" if any(byte < 0xA0 for byte in high) else "latin-1"
    return (
        f"not UTF-8 but perhaps {encoding} (byte 0x{error.object[error.start]:02x}): convert the file, "
        f"as with iconv -f {encoding} -t utf-8"
    )


def _values(text: "_Text", name: str) -> Iterator[Record]:
    """Records of the values in a text: elements of arrays, elements of an object's list, or objects."""
    number = 0
    while start := text.peek():
        line = text.line
        if start == "[":
            records = text.elements()
        elif start == "{":
            records = _records_of_object(text)
        else:
            raise _NotJSON(f"{start!r} in line {line}, where an object or a list should begin")
        for record in records:
            if isinstance(record, _Whole):
                yield f"{name}, line {line}", dict(record)
            else:
                number += 1
                yield f"{name}, record {number}", record
            text.start_record()


class _Whole(dict[str, Any]):
    """An object that is a record itself."""


def _records_of_object(text: "_Text") -> Iterator[Any]:
    """The elements of the object's list of records, or the object."""
    whole, container = _Whole(), ""
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[":
            elements = text.elements()
            first = next(elements, None)
            if isinstance(first, dict) and not first.keys() & _INSIDE_A_RECORD:
                if container:
                    raise _NotJSON(f"two lists of records, {container} and {key}")
                container = key
                yield first
                yield from elements
            else:
                whole[key] = [] if first is None else [first, *elements]
        else:
            whole[key] = text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if not container:
        yield whole


class _Text:
    """A JSON text that is read piece by piece; only the piece around the next value is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.line = 1
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._window = ""
        self._next = 0  # index in the window
        self._size = 0  # characters of the present record before the next one
        self._ended = False

    def start_record(self) -> None:
        """From here on, the characters that a record may have are counted anew."""
        self._size = 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._next < len(self._window):
                if not self._window[self._next].isspace():
                    return self._window[self._next]
                self._advance(1)
            if not self._read():
                return ""

    def take(self, expected: str) -> None:
        """Moves behind the next character. Raises `_NotJSON` for another one than `expected`."""
        found = self.peek()
        if found != expected:
            raise _NotJSON(f"{found or 'the end'!r} in line {self.line}, where {expected!r} should be")
        self._advance(1)

    def value(self) -> Any:
        """The next value. Raises `_NotJSON`, also for a record of more than `MAX_LINE_BYTES` characters."""
        self.peek()
        while True:
            fault = None
            try:
                value, end = _DECODER.raw_decode(self._window, self._next)
            except RecursionError as error:
                raise _NotJSON(f"too many nested values in line {self.line}") from error
            except json.JSONDecodeError as error:
                fault, end = error, len(self._window)
            if self._size + end - self._next > MAX_LINE_BYTES:
                raise _NotJSON(f"a record of more than {MAX_LINE_BYTES} characters in line {self.line}")
            # At the end of the window a value may lack its rest, also a number that looks whole.
            if end == len(self._window) and self._read():
                continue
            if fault is not None:
                line = self.line + self._window.count("\n", self._next, fault.pos)
                raise _NotJSON(f"{fault.msg} in line {line}") from fault
            self._advance(end - self._next)
            return value

    def elements(self) -> Iterator[Any]:
        """The elements of a list, each when the character behind it shows that it is whole."""
        self.take("[")
        more = self.peek() != "]"
        if not more:
            self.take("]")
        while more:
            element = self.value()
            more = self.peek() == ","
            self.take("," if more else "]")
            yield element

    def _advance(self, count: int) -> None:
        self.line += self._window.count("\n", self._next, self._next + count)
        self._next += count
        self._size += count

    def _read(self) -> bool:
        """Drops the text before the next character and reads on; false at the end of the file."""
        # Twice as much for a value that does not fit yet: it is parsed from its start again.
        raw = b"" if self._ended else self._file.read(max(_CHUNK, len(self._window) - self._next))
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise _NotJSON(_not_utf8(error)) from error
        if raw:
            self._window, self._next = self._window[self._next :] + more, 0
        return bool(raw)
