"""Requests to remote file systems are tried again, after growing pauses, before they count as failed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mimo_gemma4.errors import DataError

_FIRST_PAUSE = 0.25
"""Seconds before the second attempt; each further pause is twice as long."""
_GONE = (404, 410)
"""HTTP status of files that do not exist."""
_WITHOUT_RANGES = ("support range requests", "Got more bytes", "Cannot seek streaming")
"""fsspec's words for a server that answers with the whole file."""


@dataclass
class RetryPolicy:
    """How often and how long a request is tried again."""

    retries: int = 5
    """Attempts after the first."""
    seconds: float = 60.0
    """No attempt begins later than this after the first."""


POLICY = RetryPolicy()
"""The policy of this process: file systems are read from many places and threads. `train.build` sets it once."""


def retried[T](shard: str, request: Callable[[], T]) -> T:
    """The result of a request, tried again after errors. Raises `DataError`, or `FileNotFoundError` if it is absent."""
    start, attempt = time.monotonic(), 1
    while True:
        try:
            return request()
        except (DataError, NotImplementedError):
            raise
        except Exception as error:  # each file system has errors of its own, aiohttp's are no OSError
            if isinstance(error, FileNotFoundError) and is_absent(error):
                raise
            if any(words in str(error) for words in _WITHOUT_RANGES):
                raise DataError(
                    f"{shard}: its server serves no ranges ({error}); copy the shard to a local disk or to a server "
                    f"that does"
                ) from error
            pause = _FIRST_PAUSE * 2 ** (attempt - 1)
            if attempt > POLICY.retries or time.monotonic() - start + pause > POLICY.seconds:
                cause = error.__cause__ or error
                raise DataError(
                    f"{shard} cannot be read, in {attempt} attempts over {time.monotonic() - start:.1f} s "
                    f"(data.retries={POLICY.retries}, data.retry_seconds={POLICY.seconds:g}): "
                    f"{type(cause).__name__}: {cause}"
                ) from error
        time.sleep(pause)
        attempt += 1


def is_absent(error: FileNotFoundError) -> bool:
    """Whether a file does not exist. fsspec reports any failure of an HTTP server as `FileNotFoundError`."""
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) in _GONE
