"""What has left of every record, in bits, counted before it leaves; past the policy nothing leaves.

    bits(record) = sum over groups of C_group(K),    group = (artefact, alpha, epoch, series)        (composition)

K is the number of distinct draws of noise in a group and C_group(K) its `bits_after(K)`: the capacity of K releases of
one record under independent noise, (repeats) of sfumato.core.channel. The same draw again is the same bytes: it adds to
`releases` and, telling nothing new, not to the bits. Groups add up because their noise is independent given the record:

    I(X; y_1, y_2) = H(y_1, y_2) - H(y_1 | X) - H(y_2 | X) <= I(X; y_1) + I(X; y_2)

Source: Cover & Thomas, Elements of Information Theory, 2nd ed., sections 2.5 and 2.6.

What is kept: the record's code, the artefact's digest, alpha, the epoch, the bits, and every draw with how often it was
sent. Never content, never a name. One transaction enters a batch, and `enter` returns after it is on the disk:

* SQLite: write-ahead log, synchronous=FULL (a power cut loses nothing that the disk says it has flushed), BEGIN
  IMMEDIATE, so that of many processes one writes at a time.
* PostgreSQL: the first statement locks the rows of the batch's records in sorted order. So batches with a record in
  common take turns, others run side by side, and no two wait for each other. Row locks, because serializable
  transactions would be retried and advisory locks are few. It is as durable as the server's `synchronous_commit`.

Where an error or a kill leaves open whether a batch was entered, it may be in the ledger though its release never left:
the count errs on the safe side.
"""

import math
import os
import re
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from sfumato.core.errors import LedgerError, PolicyError

SCHEMA = 1  # version of the tables below
CODE_BYTES = 16  # of a record's code and of a draw: no two alike by chance before some 2^64 of them
_BUSY_SECONDS = 60  # how long a process waits for its turn to write to SQLite
_AT_ONCE = 10_000  # values in one IN list; SQLite takes 32,766
_SETUP_LOCK = int.from_bytes(b"sfumato", "big")  # names the lock under which PostgreSQL's tables are made

_KEY = ("record_id", "artefact", "alpha", "epoch", "series")  # of a group
_metadata = sa.MetaData()
_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite numbers rows by itself only where it says INTEGER
_ledger = sa.Table("sfumato_ledger", _metadata, sa.Column("version", sa.Integer, nullable=False))
_records = sa.Table(
    "sfumato_records",
    _metadata,
    sa.Column("id", _id, primary_key=True),
    sa.Column("record", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("releases", sa.BigInteger, nullable=False),
    sa.Column("bits", sa.Double, nullable=False),
)
_groups = sa.Table(
    "sfumato_groups",
    _metadata,
    sa.Column("id", _id, primary_key=True),
    sa.Column("record_id", sa.BigInteger, nullable=False),
    sa.Column("artefact", sa.LargeBinary, nullable=False),
    sa.Column("alpha", sa.Double, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("series", sa.LargeBinary, nullable=False),
    sa.Column("draws", sa.BigInteger, nullable=False),
    sa.Column("bits", sa.Double, nullable=False),
    sa.UniqueConstraint(*_KEY),
)
_draws = sa.Table(
    "sfumato_draws",
    _metadata,
    sa.Column("group_id", sa.BigInteger, primary_key=True),
    sa.Column("draw", sa.LargeBinary, primary_key=True),
    sa.Column("sent", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,  # the key is the row: some 20 bytes a draw
)

# By what the database says, what to do; the first that fits.
_ADVICE = (
    ("not a database", "name a file that is a ledger, or one that does not exist yet"),
    ("malformed", "restore it from a backup: only the ledger knows what has left already"),
    ("locked", "end the program that keeps it locked, then send again"),
    ("full", "make room on the disk, then send again"),
    ("readonly", "give this user the right to write the file and its folder"),
    ("", "see that the server runs and lets this user in, or that the file and its disk can be written"),
)


@dataclass(frozen=True)
class Policy:
    """What may leave: alpha at least, bits and releases of one record at most; None is no limit."""

    min_alpha: float = 0.0
    max_bits_per_record: float | None = None
    max_releases: int | None = None


@dataclass(frozen=True)
class Entry:
    """One release about to leave.

    record     16 bytes: keyed hash of the record's code; never content, never a name
    draw       16 bytes: releases with the same record, artefact, alpha, epoch, series and draw are the same bytes
    artefact   digest of the obfuscator, 64 hex digits
    bits_after capacity in bits of K such releases, of distinct draws, of this record together; the same function for
               all entries of one group. The ledger waits for it, so it should be fast.
    series     8 bytes: what else tells groups apart, such as the size of the record and whose noise it is

    Raises LedgerError where a field is not that.
    """

    record: bytes
    draw: bytes
    artefact: str
    alpha: float
    epoch: int
    bits_after: Callable[[int], float]
    series: bytes = bytes(8)

    def __post_init__(self) -> None:
        if len(self.record) != CODE_BYTES or len(self.draw) != CODE_BYTES:
            raise LedgerError(
                f"a record's code of {len(self.record)} bytes with a draw of {len(self.draw)}",
                wanted=f"{CODE_BYTES} bytes each",
                do="enter keyed hashes",
            )
        if not re.fullmatch("[0-9a-f]{64}", self.artefact):
            raise LedgerError("not an artefact's digest", wanted="64 hex digits in lower case", do="enter its digest")


@dataclass(frozen=True)
class Exposure:
    """What has left of one record: how often something was sent, repeats included, and bits by (composition)."""

    releases: int
    bits: float


@dataclass(frozen=True)
class Totals:
    """The whole ledger: records, releases of all of them, and the bits of the record with the most."""

    records: int
    releases: int
    largest_bits: float


_GroupKey = tuple[int, bytes, float, int, bytes]  # record's id, artefact, alpha, epoch, series


@dataclass
class _Group:
    id: int
    draws: int
    bits: float


class Ledger:
    """Exposures in `url`: a path or sqlite:///path, made with mode 0600 where absent, or postgresql://user@host/name.

    With `create` false a file must hold a ledger already.

    Serves many processes, threads and forks. Raises LedgerError where it is no ledger, one of another version, or
    cannot be reached or written.
    """

    def __init__(self, url: str | Path, policy: Policy = Policy(), *, create: bool = True) -> None:
        self.policy = policy
        where = _locate(url)
        path = Path(where.database or "")
        if not create and _is_sqlite(where) and not (path.is_file() and path.stat().st_size):
            raise LedgerError(f"{where.database}: no ledger is there", wanted="a ledger that a guard has written")
        named = where.set(query={}).render_as_string(hide_password=True)  # a query may hold a password too
        self._place = where.database or "" if _is_sqlite(where) else named
        self._engine = _sqlite(where) if _is_sqlite(where) else _postgresql(where)
        _open_ledgers.add(self)
        # one statement each for the life of the ledger, so that SQLAlchemy compiles them once
        upsert = sqlite.insert if _is_sqlite(where) else postgresql.insert
        counted, remembered = upsert(_records), upsert(_draws)
        self._count = counted.on_conflict_do_update(
            index_elements=["record"], set_={"releases": _records.c.releases + counted.excluded.releases}
        ).returning(_records.c.record, _records.c.id, _records.c.releases)
        self._remember = remembered.on_conflict_do_update(
            index_elements=["group_id", "draw"], set_={"sent": _draws.c.sent + remembered.excluded.sent}
        ).returning(_draws.c.group_id, _draws.c.draw, _draws.c.sent)
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def enter(self, entries: Sequence[Entry]) -> list[Exposure]:
        """Counts releases before they leave, all or none -> for each entry its record's exposure after all of them.

        Raises PolicyError where the policy forbids one of them and LedgerError where the ledger cannot be written:
        nothing is entered then, and nothing of the batch may leave.
        """
        for entry in entries:
            least = float(np.float32(self.policy.min_alpha))  # as releases count it: .9 is no float32
            if not entry.alpha >= least:  # true of a NaN
                raise PolicyError(
                    f"alpha = {entry.alpha:g} for record {_name(entry.record)}",
                    wanted=f"at least {self.policy.min_alpha:g}, by the policy",
                    do=f"--alpha {self.policy.min_alpha:g}",
                )
        if not entries:
            return []
        with self._transaction() as connection:
            exposures = self._compose(connection, entries)
            for record, exposure in exposures.items():
                self._permit(record, exposure)
        return [exposures[entry.record] for entry in entries]

    def exposure(self, record: bytes) -> Exposure:
        """What has left of the record; nothing of one never entered. Raises LedgerError."""
        with self._errors(), self._engine.connect() as connection:
            row = connection.execute(
                sa.select(_records.c.releases, _records.c.bits).where(_records.c.record == record)
            ).one_or_none()
        return Exposure(*row) if row else Exposure(0, 0.0)

    def totals(self) -> Totals:
        """The whole ledger in three figures. Raises LedgerError."""
        figures = sa.select(sa.func.count(), sa.func.sum(_records.c.releases), sa.func.max(_records.c.bits))
        with self._errors(), self._engine.connect() as connection:
            records, releases, bits = connection.execute(figures.select_from(_records)).one()
        return Totals(records, int(releases or 0), bits or 0.0)

    def close(self) -> None:
        """Closes the connections; a later call opens new ones."""
        self._engine.dispose()

    def _compose(self, connection: sa.Connection, entries: Sequence[Entry]) -> dict[bytes, Exposure]:
        """Writes the batch, whatever the policy -> exposures of its records. The first statement locks them all."""
        ids, releases = self._count_releases(connection, entries)
        functions: dict[_GroupKey, Callable[[int], float]] = {}
        sent: dict[_GroupKey, Counter[bytes]] = defaultdict(Counter)
        for entry in entries:
            key = (ids[entry.record], bytes.fromhex(entry.artefact), entry.alpha, entry.epoch, entry.series)
            functions[key] = entry.bits_after
            sent[key][entry.draw] += 1
        groups = _known_groups(connection, list(ids.values()))
        _add_groups(connection, groups, [key for key in sent if key not in groups])
        changed = self._remember_draws(connection, groups, sent)
        for key in changed:
            # What has left does not come back, whatever the function says.
            groups[key].bits = max(groups[key].bits, _checked(functions[key](groups[key].draws)))
        bits = _sums(groups)
        if changed:
            _update(connection, _groups, [vars(groups[key]) for key in changed], "draws", "bits")
            _update(connection, _records, [{"id": n, "bits": bits[n]} for n in sorted({k[0] for k in changed})], "bits")
        return {record: Exposure(releases[record], bits[n]) for record, n in ids.items()}

    def _count_releases(
        self, connection: sa.Connection, entries: Sequence[Entry]
    ) -> tuple[dict[bytes, int], dict[bytes, int]]:
        """Ids and releases by record. Sorted, so that two batches lock the records they share in the same order."""
        counts = Counter(entry.record for entry in entries)
        rows = [{"record": record, "releases": n, "bits": 0.0} for record, n in sorted(counts.items())]
        found = connection.execute(self._count, rows).all()
        return {record: n for record, n, _ in found}, {record: releases for record, _, releases in found}

    def _remember_draws(
        self, connection: sa.Connection, groups: dict[_GroupKey, _Group], sent: dict[_GroupKey, Counter[bytes]]
    ) -> list[_GroupKey]:
        """Writes the draws and raises K of their groups by those never seen -> groups whose K has changed."""
        keys = {groups[key].id: key for key in sent}
        rows = [
            {"group_id": n, "draw": draw, "sent": times} for n, key in keys.items() for draw, times in sent[key].items()
        ]
        changed: dict[_GroupKey, None] = {}
        for n, draw, times in connection.execute(self._remember, rows):
            key = keys[n]
            if times == sent[key][draw]:  # never sent before this batch
                groups[key].draws += 1
                changed[key] = None
        return list(changed)

    def _permit(self, record: bytes, exposure: Exposure) -> None:
        bits, releases = self.policy.max_bits_per_record, self.policy.max_releases
        if bits is not None and not exposure.bits <= bits:
            raise PolicyError(
                f"record {_name(record)} would have let out {exposure.bits:.6g} bits",
                wanted=f"at most {bits:.6g}, by the policy",
                do="send a release of it that has left already, or nothing of it",
            )
        if releases is not None and not exposure.releases <= releases:
            raise PolicyError(
                f"record {_name(record)} would have been sent {exposure.releases} times",
                wanted=f"at most {releases}, by the policy",
                do="send nothing of it any more",
            )

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with self._errors(), self._engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # the right to write first: nothing read can change
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = (error.orig if isinstance(error, DBAPIError) else None) or error
            said = (str(cause).splitlines() or [type(cause).__name__])[0]
            advice = next(advice for fragment, advice in _ADVICE if fragment in said)
            raise LedgerError(f"{self._place}: {said}", wanted="a ledger that can be written", do=advice) from error

    def _set_up(self) -> None:
        """Makes the tables where there are none. Raises LedgerError."""
        with self._transaction() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SETUP_LOCK)))
            tables = sa.inspect(connection)
            if tables.has_table(_ledger.name):
                found = connection.scalars(sa.select(sa.text("version")).select_from(_ledger)).all()
                if found != [SCHEMA]:
                    raise LedgerError(
                        f"{self._place}: a ledger of version {', '.join(map(str, found)) or 'unknown'}",
                        wanted=f"version {SCHEMA}",
                        do="use the version of sfumato that wrote it; do not start a new one for the same records",
                    )
                return
            if connection.dialect.name == "sqlite" and tables.get_table_names():
                raise LedgerError(
                    f"{self._place}: a database of something else",
                    wanted="a ledger, or a file that does not exist yet",
                    do="name another file",
                )
            _metadata.create_all(connection)
            connection.execute(sa.insert(_ledger).values(version=SCHEMA))


_open_ledgers: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _before_fork() -> None:
    # A connection must not cross a fork. SQLite forbids the child even to close it, so it is closed before.
    for ledger in list(_open_ledgers):
        ledger.close()


os.register_at_fork(before=_before_fork)


# To close a file drops every lock the process has on it, SQLite's too: nobody opens the file until its maker is done.
_making = threading.Lock()


def _locate(url: str | Path) -> URL:
    if isinstance(url, Path) or "://" not in url:
        return URL.create("sqlite", database=str(url))
    wanted, do = "a path, sqlite:///path or postgresql://user@host/name", "name the ledger like that"
    try:
        where = make_url(url)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise LedgerError("an address that cannot be read", wanted=wanted, do=do) from None  # it may hold a password
    if where.get_backend_name() == "postgresql":
        return where.set(drivername="postgresql+psycopg")
    if not _is_sqlite(where):
        raise LedgerError(f"a ledger in {where.get_backend_name()}", wanted=wanted, do=do)
    if where.database in (None, "", ":memory:"):
        raise LedgerError("a ledger in memory, which forgets", wanted=wanted, do="name a file: sqlite:///ledger.db")
    return URL.create("sqlite", database=where.database)


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _sqlite(url: URL) -> sa.Engine:
    try:
        path = os.path.realpath(url.database or "")
        with _making, suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # SQLite's log gets the same rights
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"{url.database!r} cannot be made: {getattr(error, 'strerror', None) or error}",
            wanted="a place for the ledger",
            do="name a file in a folder that exists and that you may write to",
        ) from error
    engine = sa.create_engine(
        url.set(database=path),
        hide_parameters=True,
        connect_args={"timeout": _BUSY_SECONDS, "isolation_level": None},  # None: sqlite3 begins nothing by itself
    )
    sa.event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _postgresql(url: URL) -> sa.Engine:
    try:
        # read committed: what follows the locks must see what their last holder wrote. Pre-ping: servers restart.
        return sa.create_engine(url, hide_parameters=True, isolation_level="READ COMMITTED", pool_pre_ping=True)
    except ImportError as error:
        raise LedgerError(
            "PostgreSQL's driver is not installed", wanted="psycopg", do="pip install 'sfumato[postgres]'"
        ) from error


def _known_groups(connection: sa.Connection, ids: list[int]) -> dict[_GroupKey, _Group]:
    """All groups of the records."""
    groups = {}
    columns = _groups.c
    for start in range(0, len(ids), _AT_ONCE):
        wanted = sa.select(*(columns[name] for name in _KEY), columns.id, columns.draws, columns.bits).where(
            columns.record_id.in_(ids[start : start + _AT_ONCE])
        )
        for *key, n, draws, bits in connection.execute(wanted):
            groups[_key(*key)] = _Group(n, draws, bits)
    return groups


def _add_groups(connection: sa.Connection, groups: dict[_GroupKey, _Group], keys: list[_GroupKey]) -> None:
    rows = [{**dict(zip(_KEY, key, strict=True)), "draws": 0, "bits": 0.0} for key in keys]
    if rows:
        added = sa.insert(_groups).returning(*(_groups.c[name] for name in _KEY), _groups.c.id)
        for *key, n in connection.execute(added, rows):
            groups[_key(*key)] = _Group(n, 0, 0.0)


def _update(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]], *names: str) -> None:
    values: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in names}
    named = [{f"new_{name}": row[name] for name in ("id", *names)} for row in rows]
    connection.execute(sa.update(table).where(table.c.id == sa.bindparam("new_id")).values(values), named)


def _key(record: int, artefact: bytes, alpha: float, epoch: int, series: bytes) -> _GroupKey:
    return record, artefact, alpha, epoch, series


def _sums(groups: dict[_GroupKey, _Group]) -> dict[int, float]:
    """Bits by record's id: exact sums, so that the order in which groups came does not show."""
    parts = defaultdict(list)
    for key, group in groups.items():
        parts[key[0]].append(group.bits)
    return {record: math.fsum(bits) for record, bits in parts.items()}


def _checked(bits: float) -> float:
    if not 0 <= bits < math.inf:
        raise LedgerError(f"a capacity of {bits} bits", wanted="a finite number, not negative")
    return float(bits)


def _name(record: bytes) -> str:
    return record[:4].hex()
