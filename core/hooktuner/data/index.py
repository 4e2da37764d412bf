"""What is in the folders: one SQLite row per media file, brought up to date by looking only at what changed.

A file is known by its folder, relative path, size and modification time; only new and changed files are opened. Its
identity is the digest of its bytes, so a renamed or copied file keeps its cache entries. A file that cannot be read
stays in the index with the reason, and is looked at again once it changes.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hooktuner.data.media import MediaInfo, UnreadableError, probe
from hooktuner.data.progress import PreparationStopped, progress_over

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1
"""Of the table's layout and of how files are probed; an index of another version is made anew."""

GROUP = 64
"""Rows per transaction: what a kill can cost."""

_TABLE = """
CREATE TABLE IF NOT EXISTS files (
    root TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    digest TEXT NOT NULL, width INTEGER, height INTEGER, frame_rate REAL, duration REAL, frames INTEGER,
    reason TEXT, PRIMARY KEY (root, path)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class IndexedFile:
    """A row. `path` is relative, with `/`. `info` is None where the file is unreadable for `reason`."""

    root: Path
    path: str
    size: int
    mtime_ns: int
    digest: str
    info: MediaInfo | None
    reason: str | None = None

    @property
    def file(self) -> Path:
        """Where the file is."""
        return self.root / self.path


@dataclass(frozen=True)
class ScanResult:
    """The files of a folder in the order of their paths, and how many were opened because they were new or changed."""

    files: tuple[IndexedFile, ...]
    opened: int


class MediaIndex:
    """The index at `path`. Safe against kills: every group of rows is one transaction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
        except sqlite3.DatabaseError as failure:
            if isinstance(failure, sqlite3.OperationalError):  # locked, read-only, disk full: not a broken file
                raise
            path.unlink()  # everything in it can be found out again
            self._prepare()

    def _prepare(self) -> None:
        with self._connection() as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                connection.execute("DROP TABLE IF EXISTS files")
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
            yield connection

    def scan(
        self,
        root: Path,
        wanted: Callable[[Path], bool],
        *,
        console: Console | None = None,
        stop: Callable[[], bool] | None = None,
        threads: int = 4,
    ) -> ScanResult:
        """Bring the rows of folder `root` up to date and return those of the files that `wanted` accepts.

        Symbolic links are followed, hidden files and folders skipped. Files that are gone lose their row.
        Errors: `PreparationStopped` once `stop` answers True; what was opened until then is kept.
        """
        root = root.resolve()
        known = self._rows(root)
        present = dict(_walk(root))
        self._forget(root, [path for path in known if path not in present])
        fresh: list[tuple[str, os.stat_result]] = []
        rows: dict[str, IndexedFile] = {}
        for path, status in present.items():
            if not wanted(Path(path)):
                continue
            row = known.get(path)
            if row and (row.size, row.mtime_ns) == (status.st_size, status.st_mtime_ns):
                rows[path] = row
            else:
                fresh.append((path, status))
        with ThreadPoolExecutor(max_workers=min(threads, os.cpu_count() or 1)) as pool:
            results = pool.map(lambda item: _examine(root, *item), fresh)
            group: list[IndexedFile] = []
            try:
                bar = progress_over(results, total=len(fresh), label=f"reading {root.name}", console=console)
                for done, row in enumerate(bar, start=1):
                    rows[row.path] = row
                    group.append(row)
                    if len(group) == GROUP:
                        self._keep(group)
                        group = []
                    if stop is not None and stop():
                        raise PreparationStopped(f"reading {root}", done, len(fresh))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._keep(group)
        return ScanResult(tuple(rows[path] for path in sorted(rows)), len(fresh))

    def _rows(self, root: Path) -> dict[str, IndexedFile]:
        with self._connection() as connection:
            found = connection.execute(
                "SELECT path, size, mtime_ns, digest, width, height, frame_rate, duration, frames, reason "
                "FROM files WHERE root = ?",
                (str(root),),
            ).fetchall()
        return {
            path: IndexedFile(root, path, size, mtime_ns, digest, None if reason else MediaInfo(*info), reason)
            for path, size, mtime_ns, digest, *info, reason in found
        }

    def _keep(self, rows: list[IndexedFile]) -> None:
        def values(row: IndexedFile) -> tuple[object, ...]:
            info = row.info
            measured = (info.width, info.height, info.frame_rate, info.duration, info.frames) if info else (None,) * 5
            return (str(row.root), row.path, row.size, row.mtime_ns, row.digest, *measured, row.reason)

        with self._connection() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", map(values, rows)
            )

    def _forget(self, root: Path, paths: list[str]) -> None:
        with self._connection() as connection:
            connection.executemany(
                "DELETE FROM files WHERE root = ? AND path = ?", [(str(root), path) for path in paths]
            )


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, status) of every file below `root`, sorted within each folder; link loops are cut."""
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path.stat()


def _examine(root: Path, path: str, status: os.stat_result) -> IndexedFile:
    digest, info, reason = "", None, None
    try:
        digest = file_digest(root / path)
        info = probe(root / path)
    except UnreadableError as failure:
        reason = str(failure) or "it cannot be decoded"
    except OSError as failure:
        reason = failure.strerror or str(failure)
    return IndexedFile(root, path, status.st_size, status.st_mtime_ns, digest, info, reason)


def file_digest(path: Path) -> str:
    """blake2b (20 bytes, hex) of the bytes of a file."""
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
