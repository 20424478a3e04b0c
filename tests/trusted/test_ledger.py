"""What is entered stays, adds up as an independent count does, and never passes the policy, whoever else writes."""

import json
import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.core.errors import LedgerError
from sfumato.trusted.ledger import Entry, Exposure, Ledger, Policy, Totals

SRC = Path(sfumato.__file__).resolve().parent.parent
ARTEFACTS = ("0a" * 32, "f1" * 32)

# What the child processes below begin with: the same entries as `entry` makes.
CHILD = """
import json, math, os, random, sys
from sfumato.core.errors import LedgerError
from sfumato.trusted.ledger import Entry, Ledger, Policy

def entry(record, draw, alpha=0.5):
    return Entry(record, draw, "0a" * 32, alpha, 0, lambda k: 100 * (1 - alpha) * math.log2(1 + k))
"""


def code(n: int, salt: bytes = b"") -> bytes:
    return salt.ljust(12, b"\0") + n.to_bytes(4, "big")


def capacity(alpha: float, releases: int) -> float:
    """Any growing function does."""
    return 100 * (1 - alpha) * math.log2(1 + releases)


def entry(record: bytes, draw: bytes, artefact: str = ARTEFACTS[0], alpha: float = 0.5, epoch: int = 0) -> Entry:
    return Entry(record, draw, artefact, alpha, epoch, lambda releases: capacity(alpha, releases))


class Oracle:
    """Slow and obvious: everything ever sent, in lists."""

    def __init__(self) -> None:
        self.sent: dict[bytes, list[Entry]] = defaultdict(list)

    def enter(self, entries: Sequence[Entry]) -> list[Exposure]:
        for one in entries:
            self.sent[one.record].append(one)
        return [self.exposure(one.record) for one in entries]

    def exposure(self, record: bytes) -> Exposure:
        seen: dict[tuple[str, float, int], set[bytes]] = defaultdict(set)
        for one in self.sent[record]:
            seen[one.artefact, one.alpha, one.epoch].add(one.draw)
        bits = math.fsum(capacity(alpha, len(draws)) for (_, alpha, _), draws in seen.items())
        return Exposure(len(self.sent[record]), bits)


def child(program: str, *words: object, stdin: int | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + program, *map(str, words)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )


def outputs(children: "Sequence[subprocess.Popen[str]]") -> list[str]:
    """Lets all go at once, and returns what each printed."""
    for one in children:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    printed = [one.communicate()[0] for one in children]
    assert [one.returncode for one in children] == [0] * len(children)
    return printed


class Behaviours:
    """What every ledger does, whatever it is kept in. A subclass gives the fixture `url`: an empty ledger's place."""

    @pytest.fixture
    def ledger(self, url: str) -> Iterator[Ledger]:
        with closing(Ledger(url)) as made:
            yield made

    def test_nothing_was_sent_of_a_record_never_entered(self, ledger: Ledger) -> None:
        assert ledger.exposure(code(1)) == Exposure(0, 0.0)
        assert ledger.totals() == Totals(0, 0, 0.0)
        assert ledger.enter([]) == []

    def test_a_new_draw_adds_bits_and_a_repeat_only_releases(self, ledger: Ledger) -> None:
        assert ledger.enter([entry(code(1), code(1))]) == [Exposure(1, 50.0)]
        assert ledger.enter([entry(code(1), code(1))]) == [Exposure(2, 50.0)]
        assert ledger.enter([entry(code(1), code(2)), entry(code(1), code(3))]) == [Exposure(4, 100.0)] * 2
        assert ledger.exposure(code(1)) == Exposure(4, 100.0) and ledger.exposure(code(2)) == Exposure(0, 0.0)

    @pytest.mark.parametrize("other", [{"artefact": ARTEFACTS[1]}, {"epoch": -7}, {"alpha": 0.5 + 2**-53}])
    def test_groups_add_up(self, ledger: Ledger, other: dict[str, object]) -> None:
        ledger.enter([entry(code(1), code(1))])
        (exposure,) = ledger.enter([entry(code(1), code(1), **other)])  # type: ignore[arg-type]
        assert exposure.releases == 2 and exposure.bits == pytest.approx(100)

    def test_composition_is_that_of_the_oracle(self, ledger: Ledger) -> None:
        few = st.integers(0, 2)
        alphas = st.sampled_from([0.0, 0.1, 0.7, 0.95])
        batches = st.lists(st.lists(st.tuples(few, few, st.integers(0, 1), alphas, few), max_size=8), max_size=6)
        oracle, example = Oracle(), iter(range(1 << 30))

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(batches)
        def check(drawn: list[list[tuple[int, int, int, float, int]]]) -> None:
            salt = b"%d" % next(example)  # records of its own for every example
            for batch in drawn:
                made = [entry(code(r, salt), code(d), ARTEFACTS[f], a, e) for r, d, f, a, e in batch]
                assert ledger.enter(made) == oracle.enter(made)

        check()
        found = {record: ledger.exposure(record) for record in oracle.sent}
        assert found == {record: oracle.exposure(record) for record in oracle.sent}
        most = max(exposure.bits for exposure in found.values())
        assert ledger.totals() == Totals(len(found), sum(exposure.releases for exposure in found.values()), most)

    def test_a_batch_larger_than_one_statement_takes(self, ledger: Ledger) -> None:
        made = [entry(code(n % 21_000), code(n)) for n in range(42_000)]
        assert set(ledger.enter(made)) == {Exposure(2, capacity(0.5, 2))}
        assert ledger.totals() == Totals(21_000, 42_000, capacity(0.5, 2))

    def test_it_is_there_when_opened_again(self, url: str) -> None:
        for n in range(3):
            with closing(Ledger(url)) as ledger:
                assert ledger.exposure(code(1)).releases == n
                ledger.enter([entry(code(1), code(n % 2))])
        with closing(Ledger(url)) as ledger:
            assert ledger.exposure(code(1)) == Exposure(3, capacity(0.5, 2))

    @pytest.mark.parametrize(
        ("policy", "refused", "said"),
        [
            (Policy(min_alpha=0.5), [entry(code(3), code(3), alpha=0.4)], "alpha = 0.4"),
            (Policy(min_alpha=0.5), [entry(code(3), code(3), alpha=math.nan)], "alpha = nan"),
            (Policy(max_bits_per_record=99), [entry(code(3), code(n)) for n in range(3)], "100 bits"),
            (Policy(max_bits_per_record=99), [entry(code(2), code(8)), entry(code(2), code(9))], "100 bits"),
            (Policy(max_bits_per_record=99), [entry(code(2), code(n), epoch=n) for n in (0, 1)], "bits"),
            (Policy(max_releases=2), [entry(code(2), code(1)), entry(code(2), code(1))], "3 times"),
            (Policy(max_bits_per_record=math.nan), [entry(code(3), code(3))], "bits"),
        ],
    )
    def test_a_refusal_leaves_nothing_behind(self, url: str, policy: Policy, refused: list[Entry], said: str) -> None:
        with closing(Ledger(url)) as free, closing(Ledger(url, policy)) as ledger:
            free.enter([entry(code(1), code(1)), entry(code(2), code(1))])
            before = free.totals()
            for batch in ([entry(code(1), code(2)), *refused], [*refused, entry(code(4), code(2))]):
                with pytest.raises(LedgerError, match=said) as caught:
                    ledger.enter(batch)
                assert caught.value.wanted and caught.value.do and caught.value.exit_code == 2
                assert refused[0].record[:4].hex() in str(caught.value)
                assert refused[0].record.hex() not in str(caught.value)
            assert free.totals() == before
            assert [free.exposure(code(n)) for n in (1, 2, 3, 4)] == [Exposure(1, 50.0)] * 2 + [Exposure(0, 0.0)] * 2
            assert free.enter([entry(code(1), code(2))]) == [Exposure(2, capacity(0.5, 2))]

    def test_the_policy_s_limits_may_be_reached(self, url: str) -> None:
        limit = Policy(min_alpha=0.5, max_bits_per_record=100, max_releases=4)
        with closing(Ledger(url, limit)) as ledger:
            batch = [entry(code(1), code(n)) for n in (1, 2, 3, 3)]
            assert ledger.enter(batch) == [Exposure(4, 100.0)] * 4

    @pytest.mark.parametrize("bits", [math.nan, math.inf, -1.0])
    def test_a_capacity_that_is_none(self, ledger: Ledger, bits: float) -> None:
        with pytest.raises(LedgerError, match="a capacity of"):
            ledger.enter([entry(code(1), code(1)), Entry(code(2), code(1), ARTEFACTS[0], 0.5, 0, lambda _: bits)])
        assert ledger.totals() == Totals(0, 0, 0.0)

    def test_an_error_of_the_caller_s_leaves_nothing_behind(self, ledger: Ledger) -> None:
        def fail(_: int) -> float:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            ledger.enter([entry(code(1), code(1)), Entry(code(2), code(1), ARTEFACTS[0], 0.5, 0, fail)])
        assert ledger.totals() == Totals(0, 0, 0.0)
        ledger.enter([entry(code(1), code(1))])

    def test_processes_never_pass_the_policy_together(self, url: str) -> None:
        """Every one may enter the record 10 times; together they would pass both limits but for the ledger."""
        program = """
ledger = Ledger(sys.argv[1], Policy(max_releases=23))
worker, entered = int(sys.argv[2]) + 1, 0
sys.stdin.readline()
for n in range(10):
    mine = [entry(bytes(16), bytes([worker, n]) * 8), entry(bytes([worker, n]) * 8, bytes(16))]
    try:
        ledger.enter(mine if worker % 2 else mine[::-1])
        entered += 1
    except LedgerError as error:
        assert "by the policy" in str(error), error
print(entered)
"""
        counts = [int(out) for out in outputs([child(program, url, n, stdin=subprocess.PIPE) for n in range(4)])]
        assert sum(counts) == 23
        with closing(Ledger(url)) as ledger:
            assert ledger.exposure(bytes(16)) == Exposure(23, capacity(0.5, 23))
            assert ledger.totals().records == 24

    def test_processes_with_the_same_records_in_any_order_all_get_through(self, url: str) -> None:
        program = """
ledger, rng = Ledger(sys.argv[1]), random.Random(int(sys.argv[2]))
sys.stdin.readline()
for n in range(20):
    records = [bytes([k]) * 16 for k in range(12)]
    rng.shuffle(records)
    ledger.enter([entry(record, rng.randbytes(16)) for record in records])
"""
        outputs([child(program, url, n, stdin=subprocess.PIPE) for n in range(4)])
        with closing(Ledger(url)) as ledger:
            assert {ledger.exposure(bytes([k]) * 16) for k in range(12)} == {Exposure(80, capacity(0.5, 80))}

    def test_processes_may_make_the_ledger_at_the_same_time(self, url: str) -> None:
        program = """
sys.stdin.readline()
Ledger(sys.argv[1]).enter([entry(bytes(16), os.urandom(16))])
"""
        outputs([child(program, url, stdin=subprocess.PIPE) for _ in range(6)])
        with closing(Ledger(url)) as ledger:
            assert ledger.exposure(bytes(16)).releases == 6

    def test_threads_share_a_ledger(self, ledger: Ledger) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(lambda n: ledger.enter([entry(code(1), code(n % 20)), entry(code(n), code(1))]), range(2, 42))
            )
        assert ledger.exposure(code(1)) == Exposure(40, capacity(0.5, 20))

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_parent_and_child_of_a_fork_both_go_on(self, ledger: Ledger) -> None:
        ledger.enter([entry(code(1), code(1))])
        forked = os.fork()
        if forked == 0:
            try:
                ledger.enter([entry(code(1), code(2))])
                os._exit(0)
            finally:
                os._exit(1)
        ledger.enter([entry(code(1), code(3))])
        assert os.waitpid(forked, 0)[1] == 0
        assert ledger.enter([entry(code(1), code(4))]) == [Exposure(4, capacity(0.5, 4))]

    def test_kills_lose_nothing_that_was_acknowledged(self, url: str, tmp_path: Path) -> None:
        program = """
ledger, rng = Ledger(sys.argv[1]), random.Random()
while True:
    batch = [entry(bytes([rng.randrange(40)]) * 16, rng.randbytes(16)) for _ in range(rng.randint(1, 30))]
    batch += batch[:3]
    ledger.enter(batch)
    print(json.dumps([[one.record.hex(), one.draw.hex()] for one in batch]), flush=True)
"""
        lines: list[str] = []
        for _ in range(4):
            victims = [child(program, url) for _ in range(2)]
            for victim in victims:
                assert victim.stdout is not None
                lines += [victim.stdout.readline() for _ in range(random.randint(1, 12))]
                victim.send_signal(signal.SIGKILL)
                lines += victim.communicate()[0].splitlines(keepends=True)
                assert victim.returncode == -signal.SIGKILL
        sent: Counter[bytes] = Counter()
        draws: dict[bytes, set[str]] = defaultdict(set)
        for line in lines:
            for record, draw in json.loads(line) if line.endswith("\n") else ():  # the kill may tear the last
                sent[bytes.fromhex(record)] += 1
                draws[bytes.fromhex(record)].add(draw)
        assert sent
        with closing(Ledger(url)) as ledger:
            for record, releases in sent.items():
                found = ledger.exposure(record)
                # entered, and killed before it could say so: no more than the eight last batches
                assert releases <= found.releases <= releases + 8 * 33
                assert capacity(0.5, len(draws[record])) <= found.bits <= capacity(0.5, len(draws[record]) + 8 * 30)
            # each draw acknowledged is known: to send it again adds no bits
            again = [entry(record, bytes.fromhex(draw)) for record, several in draws.items() for draw in several]
            before = {record: ledger.exposure(record).bits for record in sent}
            assert [found.bits for found in ledger.enter(again)] == [before[one.record] for one in again]

    def test_another_version_is_refused(self, url: str, execute: Callable[[str], None]) -> None:
        Ledger(url).close()
        for statement, said in (
            ("UPDATE sfumato_ledger SET version = 2", "version 2"),
            ("DELETE FROM sfumato_ledger", "version unknown"),
        ):
            execute(statement)
            with pytest.raises(LedgerError, match=said):
                Ledger(url)


class TestSqlite(Behaviours):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "ledger.db")

    @pytest.fixture
    def execute(self, url: str) -> Callable[[str], None]:
        def run(statement: str) -> None:
            with closing(sqlite3.connect(url)) as connection, connection:
                connection.execute(statement)

        return run

    def test_the_name_s_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        place = tmp_path / "a ledger?#%.db"
        names: list[str | Path] = [place, str(place), place.name, f"sqlite:///{tmp_path}/b.db", "sqlite:///b.db"]
        for n, name in enumerate(names):
            with closing(Ledger(name)) as ledger:
                assert ledger.enter([entry(code(1), code(1))])[0].releases == (n + 1 if n < 3 else n - 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a ledger?#%.db", "b.db"]

    def test_only_the_owner_may_read(self, url: str, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            with closing(Ledger(url)) as ledger:
                ledger.enter([entry(code(1), code(1))])
                modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        finally:
            os.umask(before)
        assert set(modes) == {"ledger.db", "ledger.db-wal", "ledger.db-shm"} and set(modes.values()) == {0o600}

    def test_every_commit_is_flushed(self, ledger: Ledger) -> None:
        with ledger._engine.connect() as connection:
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert found == ["wal", 2]

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list a process's files")
    def test_no_connection_crosses_a_fork(self, ledger: Ledger, url: str) -> None:
        def held() -> list[str]:
            return [name for name in map(_link, Path("/proc/self/fd").iterdir()) if name.startswith(url)]

        ledger.enter([entry(code(1), code(1))])
        assert held()
        forked = os.fork()
        if forked == 0:
            try:
                os._exit(len(held()))
            finally:
                os._exit(99)
        assert os.waitpid(forked, 0)[1] == 0

    def test_a_draw_takes_few_bytes(self, ledger: Ledger, url: str) -> None:
        ledger.enter([entry(code(1), code(0))])
        ledger.close()
        before = Path(url).stat().st_size
        ledger.enter([entry(code(1), os.urandom(16)) for _ in range(20_000)])
        ledger.close()
        assert (Path(url).stat().st_size - before) / 20_000 < 40  # 16 of the draw, the group's number, the count

    @pytest.mark.parametrize("name", ["none/ledger.db", "a\0b", "n" * 300, "."])
    def test_a_place_no_ledger_can_be_in(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(LedgerError) as caught:
            Ledger(tmp_path / name)
        assert caught.value.wanted and caught.value.do

    @pytest.mark.parametrize(
        "url", ["sqlite://", "sqlite:///:memory:", "mysql://user:secret@host/db", "postgresql://user:secret@host:no/db"]
    )
    def test_an_address_that_is_none(self, url: str) -> None:
        with pytest.raises(LedgerError) as caught:
            Ledger(url)
        assert caught.value.wanted and caught.value.do and "secret" not in str(caught.value)

    def test_a_file_that_is_no_database(self, url: str) -> None:
        Path(url).write_bytes(b"my diary, and not a ledger at all\n" * 100)
        with pytest.raises(LedgerError, match="not a database") as caught:
            Ledger(url)
        assert "does not exist yet" in caught.value.do
        assert Path(url).read_bytes().startswith(b"my diary")

    def test_a_database_of_something_else(self, url: str, execute: Callable[[str], None]) -> None:
        execute("CREATE TABLE recipes (name TEXT)")
        with pytest.raises(LedgerError, match="something else"):
            Ledger(url)

    def test_a_damaged_ledger(self, url: str) -> None:
        with closing(Ledger(url)) as ledger:
            ledger.enter([entry(code(n), code(n)) for n in range(2000)])
        size = Path(url).stat().st_size
        with Path(url).open("r+b") as file:
            file.seek(8192)
            file.write(b"\xa5" * (size - 8192))
        with pytest.raises(LedgerError, match=r"malformed|ledger\.db"), closing(Ledger(url)) as ledger:
            ledger.enter([entry(code(n), code(n)) for n in range(2000)])

    def test_a_ledger_that_may_not_be_written(self, url: str) -> None:
        with closing(Ledger(url)) as ledger:
            ledger.enter([entry(code(1), code(1))])
        Path(url).chmod(0o444)
        Path(url).parent.chmod(0o555)
        try:
            with unprivileged(), pytest.raises(LedgerError) as caught:
                Ledger(url)
        finally:
            Path(url).parent.chmod(0o700)
        assert caught.value.do

    def test_a_full_disk_refuses_and_loses_nothing(self, ledger: Ledger) -> None:
        ledger.enter([entry(code(1), code(1))])
        entered = 0

        def fill() -> None:
            nonlocal entered
            for n in range(1000):
                ledger.enter([entry(code(2), code(50 * n + k)) for k in range(50)])
                entered = 50 * (n + 1)

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(LedgerError) as caught:
                fill()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.do and entered
        assert ledger.exposure(code(1)) == Exposure(1, 50.0)
        assert ledger.exposure(code(2)) == Exposure(entered, capacity(0.5, entered))
        ledger.enter([entry(code(2), code(10**6))])

    def test_a_locked_ledger_is_refused_in_the_end(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sfumato.trusted.ledger._BUSY_SECONDS", 0)
        with closing(Ledger(url)) as ledger, closing(sqlite3.connect(url)) as other:
            ledger.enter([entry(code(1), code(1))])
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError, match="locked") as caught:
                ledger.enter([entry(code(1), code(1))])
            assert "keeps it locked" in caught.value.do
            assert ledger.exposure(code(1)).releases == 1, "readers wait for nobody"
            other.rollback()
            assert ledger.enter([entry(code(1), code(1))])[0].releases == 2


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # the folder's own descriptor, closed by now
        return ""


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who owns nothing: root may write anywhere, so it steps down for the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("record", "draw", "artefact"),
    [
        (b"Ada Lovelace", bytes(16), ARTEFACTS[0]),
        (bytes(16), bytes(15), ARTEFACTS[0]),
        (bytes(16), bytes(16), "holiday.jpg"),
        (bytes(16), bytes(16), "0A" * 32),
        (bytes(16), bytes(16), "0a" * 32 + "\n"),
    ],
)
def test_an_entry_takes_codes_only(record: bytes, draw: bytes, artefact: str) -> None:
    with pytest.raises(LedgerError) as caught:
        entry(record, draw, artefact)
    assert "Ada" not in str(caught.value) and "holiday" not in str(caught.value)
