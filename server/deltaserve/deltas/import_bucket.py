"""Artifacts that lie in a bucket of S3 already, under one allow-listed prefix. Credentials, region and endpoint as for
a store there (`deltas.s3`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.deltas.imports import Import, ImportRoot, Imports, missing
from deltaserve.deltas.places import IN_BUCKET
from deltaserve.deltas.s3 import CLIENT, PIECE_BYTES, RETRIES, first_line
from deltaserve.errors import BadRequest, StoreUnavailable

if TYPE_CHECKING:
    from obstore import GetResult

logger = logging.getLogger(__name__)


def open_imports(root: str | None) -> Imports:
    """`root`: a directory, s3://BUCKET/PREFIX, or None: nothing is imported. Raises BadRequest, StoreUnavailable."""
    if root is not None and root.startswith(IN_BUCKET):
        return ImportBucket(root)
    return ImportRoot(None if root is None else Path(root))


class ImportBucket:
    """`url`: s3://BUCKET/PREFIX. Raises BadRequest without what S3 needs; StoreUnavailable, from `open` too, while the
    bucket cannot be read."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise BadRequest("--import-root s3://… needs: pip install 'deltaserve[s3]'") from None
        self._obstore = obstore
        self._url = url.rstrip("/") + "/"
        try:
            self._store = S3Store.from_url(url, client_options=CLIENT, retry_config=RETRIES)
            next(iter(obstore.list(self._store, chunk_size=1)), None)  # a bucket that is not there is told at the start
        except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            raise StoreUnavailable(f"--import-root {url}: {first_line(error)}") from None

    @contextmanager
    def open(self, asked: str) -> Iterator[Import]:
        """`asked` is a key relative to the prefix, or a whole s3://BUCKET/PREFIX/KEY. Raises NotFound, in the same
        words for one elsewhere and for none; StoreUnavailable, while it is read too."""
        key = asked.removeprefix(self._url)
        if any(segment in ("", ".", "..") for segment in key.split("/")):  # any other URL has an empty one
            raise missing(asked)
        with self._failing(asked):
            found = self._obstore.get(self._store, key)
        yield Import(found.meta["size"], self._pieces(asked, found))

    def _pieces(self, asked: str, found: GetResult) -> Iterator[bytes]:
        with self._failing(asked):
            yield from map(bytes, found.stream(min_chunk_size=PIECE_BYTES))

    @contextmanager
    def _failing(self, asked: str) -> Iterator[None]:
        errors = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, errors.NotFoundError, ValueError):  # ValueError: what no key can be
            raise missing(asked) from None
        except errors.BaseError as error:
            logger.error("the import root cannot be read: %.200r: %s", asked, first_line(error))
            raise StoreUnavailable("the import root cannot be read now; try again") from None
