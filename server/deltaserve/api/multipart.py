"""A multipart form with one file, handed on as it comes: nothing of it is collected in memory or put aside twice."""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deltaserve.errors import BadRequest

OVERHEAD_BYTES = 64 * 1024  # of boundaries and headers, at most
MAX_TEXT_CHARS = 256


class OneFile:
    """`feed` it the body, then `end`. What the field `name` holds goes to `write`; short fields called as in `texts`
    are collected there. Both raise BadRequest for anything but a form with this one file, and whatever `write` and
    `begin`, which is told the file's name, raise."""

    def __init__(
        self,
        content_type: str,
        name: str,
        write: Callable[[bytes], None],
        *,
        texts: dict[str, str] | None = None,
        begin: Callable[[str], None] = lambda filename: None,
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest(f"the body must be multipart/form-data with a boundary and one field `{name}`", param=name)
        self._name = name
        self._write = write
        self._texts = {} if texts is None else texts
        self._begin = begin
        self._header, self._value = bytearray(), bytearray()
        self._field: str | None = None
        self._filename = ""
        self._has_field = self._is_whole = False
        callbacks = {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_end": self._ends,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise BadRequest(f"the form cannot be read: {error}", param=name) from None

    def feed(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise BadRequest(f"the form cannot be read: {error}", param=self._name) from None

    def end(self) -> None:
        if not self._is_whole or not self._has_field:
            raise BadRequest(f"the form ends before the field `{self._name}` does", param=self._name)

    def _part_begins(self) -> None:
        self._field = None

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(bytes(self._value))[1]
            self._field, self._filename = (
                options.get(key, b"").decode("utf-8", errors="backslashreplace") for key in (b"name", b"filename")
            )
        self._header.clear()
        self._value.clear()

    def _data(self, piece: bytes) -> None:
        if self._field == self._name:
            return self._write(piece)
        assert self._field is not None
        self._texts[self._field] += piece.decode("utf-8", errors="backslashreplace")
        if len(self._texts[self._field]) > MAX_TEXT_CHARS:
            raise BadRequest(f"the field `{self._field}` is too long", param=self._field)

    def _headers_end(self) -> None:
        if self._field in self._texts and not self._texts[self._field]:
            return
        if self._field != self._name or self._has_field:
            raise BadRequest(f"the form must have one field `{self._name}`", param=self._name)
        self._has_field = True
        self._begin(self._filename)

    def _ends(self) -> None:
        self._is_whole = True
