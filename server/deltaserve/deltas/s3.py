"""Files in a bucket of S3, for several servers, and on this server's disk as far as there is room: its cache.

What arrives from the bucket is checked against the digest in its key. Credentials, region and endpoint are the usual
variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, …), or the machine's role. Needs
`pip install 'deltaserve[s3]'`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from deltaserve.deltas.files import FOLDERS, LocalFiles
from deltaserve.errors import BadRequest, DeltaLoadFailed, IncompatibleStore, StoreUnavailable
from deltaserve.tenants.registry import alone_in, disk_full_is_an_answer

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

logger = logging.getLogger(__name__)
PIECE_BYTES = 8 * 2**20
MARK = "registry"  # says whose this bucket is
CLIENT: ClientConfig = {
    "connect_timeout": timedelta(seconds=5), "read_timeout": timedelta(seconds=30), "timeout": timedelta(days=1),
    "allow_http": True,  # where the endpoint says so
}  # fmt: skip
RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}


class S3Files:
    """`url`: s3://BUCKET/PREFIX. `root`: the cache, of this process alone, of `max_bytes` beside what is being read.
    `owner`: the registry's id; one bucket and prefix belong to one registry. Thread-safe. Raises BadRequest,
    StoreInUse, IncompatibleStore; StoreUnavailable, from any call, while the bucket cannot be reached."""

    def __init__(self, url: str, root: Path, max_bytes: int, owner: str) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError:
            raise BadRequest("a store in S3 needs: pip install 'deltaserve[s3]'") from None
        self._obstore = obstore
        root.mkdir(parents=True, exist_ok=True)
        self._guard = alone_in(root, f"{root}: another server has its cache here; each needs one of its own")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._readers: Counter[str] = Counter()
        try:
            self._cache = LocalFiles(root)
            self.incoming = self._cache.incoming
            found = [key for folder in FOLDERS for key in self._cache.keys(folder)]
            stats = {key: self._cache.path(key).stat() for key in found}
            found.sort(key=lambda key: stats[key].st_mtime)
            self._sizes = OrderedDict((key, stats[key].st_size) for key in found)  # the last used last
            try:
                self._store = S3Store.from_url(url, client_options=CLIENT, retry_config=RETRIES)
                self._claim(owner)
            except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
                raise StoreUnavailable(f"--store {url}: {first_line(error)}") from None
        except BaseException:
            self.close()
            raise

    def put(self, key: str, source: Path) -> None:
        num_bytes = source.stat().st_size
        with self._failing(key):
            self._obstore.put(self._store, key, source)
        self._keep(key, source, num_bytes)

    @contextmanager
    def reading(self, key: str) -> Iterator[Path]:
        path = self._cache.path(key)
        with self._lock:
            self._readers[key] += 1
        try:
            if not path.exists():
                self._fetch(key)
            yield path
        except Exception:
            self._forget(key)  # whatever is wrong with it, the bucket has it again
            raise
        finally:
            with self._lock:
                self._readers[key] -= 1
                if key in self._sizes:
                    self._sizes.move_to_end(key)
            self._trim()

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._failing(key):
            self._obstore.delete(self._store, key)
        self._forget(key)

    def keys(self, prefix: str) -> Iterator[str]:
        with self._failing(prefix):
            for page in self._obstore.list(self._store, f"{prefix}/"):
                yield from (found["path"] for found in page)

    def size(self, key: str) -> int:
        with self._failing(key):
            return int(self._obstore.head(self._store, key)["size"])

    def close(self) -> None:
        self._guard.close()

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def _claim(self, owner: str) -> None:
        """Whoever writes here first, it is theirs: another registry would take every file for one without a name."""
        try:
            self._obstore.put(self._store, MARK, owner.encode(), mode="create")
        except self._obstore.exceptions.AlreadyExistsError:
            found = bytes(self._obstore.get(self._store, MARK).bytes()).decode(errors="replace")
            if found != owner:
                raise IncompatibleStore("--store: this bucket and prefix belong to another registry") from None

    def _fetch(self, key: str) -> None:
        """Into the cache. Raises FileNotFoundError, DeltaLoadFailed for other bytes than the key says."""
        descriptor, name = tempfile.mkstemp(dir=self.incoming)
        path = Path(name)
        try:
            digest = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as file, disk_full_is_an_answer(), self._failing(key):
                for piece in self._obstore.get(self._store, key).stream(min_chunk_size=PIECE_BYTES):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != Path(key).stem:
                raise DeltaLoadFailed(f"the bucket's {key} is damaged: its bytes have the digest {digest.hexdigest()}")
            self._keep(key, path, path.stat().st_size)
        finally:
            path.unlink(missing_ok=True)

    def _keep(self, key: str, path: Path, num_bytes: int) -> None:
        self._cache.put(key, path)
        with self._lock:
            self._sizes[key] = num_bytes
            self._sizes.move_to_end(key)
        self._trim()

    def _forget(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)
            self._cache.remove(key)

    def _trim(self) -> None:
        """Down to the bound, what was used last stays longest, and what is being read in any case."""
        with self._lock:
            held = sum(self._sizes.values())
            for key in [key for key in self._sizes if not self._readers[key]]:
                if held <= self._max_bytes:
                    break
                held -= self._sizes.pop(key)
                self._cache.remove(key)
            self._readers += Counter()  # those at zero go

    @contextmanager
    def _failing(self, key: str) -> Iterator[None]:
        errors = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, errors.NotFoundError):
            raise FileNotFoundError(f"the bucket has no {key}") from None
        except errors.BaseError as error:
            logger.error("the store cannot be reached: %s: %s", key, first_line(error))
            raise StoreUnavailable("the store cannot be reached now; try again") from None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
