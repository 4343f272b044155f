"""Answers of a judge on disk, by the request they answer."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from pathlib import Path

from r1kern.errors import UserError

BUSY_S = 60.0  # wait for another process's write


class AnswerCache:
    """A sqlite file; safe over threads and processes of one machine.

    A write is whole or absent, also after `kill -9` (write-ahead log; only a crash of the machine
    itself may cost the newest answers). The log needs a local disk: sqlite's locks are not to be
    trusted on network file systems.
    """

    def __init__(self, path: str | Path):
        """Opens or makes the file.

        Raises:
            UserError: it cannot be opened, or holds something else.
        """
        self._path = Path(path)
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(
                self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = NORMAL")
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)"
            )
            self._rows.execute("SELECT request, answer FROM answers LIMIT 1").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge.cache {path} cannot be used ({error}): name another file, or remove it"
            ) from error

    def get(self, request: bytes) -> str | None:
        """The answer kept for this request."""
        row = self._execute("SELECT answer FROM answers WHERE request = ?", _digest(request))
        return row and row[0]

    def put(self, request: bytes, answer: str) -> None:
        """Keeps an answer; the newest one counts. UserError when it cannot be written."""
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", _digest(request), answer)

    def close(self) -> None:
        with self._lock:
            self._rows.close()

    def _execute(self, statement: str, *values: str) -> tuple | None:
        try:
            with self._lock:
                return self._rows.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise UserError(
                f"judge.cache {self._path} failed ({error}): see to the disk, or name another file"
            ) from error


def _digest(request: bytes) -> str:
    return hashlib.sha256(request).hexdigest()
