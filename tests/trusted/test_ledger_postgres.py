"""A ledger in a real PostgreSQL server, made for these tests, does what one in a file does."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from sfumato.core.errors import LedgerError
from sfumato.trusted.ledger import Exposure, Ledger
from tests.trusted.test_ledger import Behaviours, capacity, code, entry

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'sfumato[postgres]'")


def binaries() -> Path:
    """The folder with initdb and pg_ctl, the newest of Debian's where PATH has none; else a skip."""
    found = shutil.which("pg_ctl")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    for folder in [*([Path(found).resolve().parent] if found else []), *reversed(versions)]:
        if (folder / "initdb").is_file() and (folder / "pg_ctl").is_file():
            return folder
    pytest.skip("no PostgreSQL here: apt-get install postgresql")


def as_postgres() -> list[str]:
    """PostgreSQL refuses to run as root, so root runs it as the user postgres."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or no runuser")
    return ["runuser", "-u", "postgres", "--"]


class Server:
    """A server of its own folder and port, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs, self.user = folder, binaries(), as_postgres()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self.user:
            shutil.chown(folder, "postgres")
        self.run("initdb", "--auth=trust", "--username=ledger", "--encoding=UTF8", "--no-sync")

    def run(self, program: str, *words: str) -> None:
        command = [*self.user, str(self.programs / program), "-D", str(self.folder / "data"), *words]
        # to a file, not a pipe: the server keeps it open
        with (self.folder / f"{program}.out").open("w+") as out:
            done = subprocess.run(command, stdout=out, stderr=out, cwd=self.folder, check=False)
            out.seek(0)
            assert done.returncode == 0, out.read()

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        self.run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-w", "-m", mode, "stop")

    def url(self, database: str = "postgres", user: str = "ledger") -> str:
        return f"postgresql://{user}:secret@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        where = sa.make_url(self.url(database)).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(where, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # a short path: a socket's may have 107 bytes
        made = Server(Path(folder))
        made.start()
        yield made
        made.stop("immediate")


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    server.execute("CREATE DATABASE one_test")
    yield server.url("one_test")
    server.execute("DROP DATABASE one_test WITH (FORCE)")


class TestPostgres(Behaviours):
    @pytest.fixture
    def execute(self, server: Server) -> Callable[[str], None]:
        return lambda statement: server.execute(statement, "one_test")

    def test_other_tables_may_lie_beside_it(self, url: str, execute: Callable[[str], None]) -> None:
        execute("CREATE TABLE recipes (name TEXT)")
        with closing(Ledger(url)) as ledger:
            assert ledger.enter([entry(code(1), code(1))]) == [Exposure(1, 50.0)]

    @pytest.mark.parametrize("level", ["serializable", "read uncommitted"])
    def test_the_server_s_isolation_does_not_matter(self, url: str, execute: Callable[[str], None], level: str) -> None:
        execute(f"ALTER DATABASE one_test SET default_transaction_isolation = '{level}'")
        self.test_processes_never_pass_the_policy_together(url)

    def test_what_is_acknowledged_outlives_a_crash_of_the_server(self, ledger: Ledger, server: Server) -> None:
        ledger.enter([entry(code(1), code(1))])
        server.stop("immediate")  # no checkpoint: it has to recover
        with pytest.raises(LedgerError, match="postgresql") as caught:
            ledger.enter([entry(code(1), code(2))])
        assert "see that the server runs" in caught.value.do
        server.start()
        assert ledger.enter([entry(code(1), code(3))]) == [Exposure(2, capacity(0.5, 2))]

    def test_a_server_that_does_not_answer(self, server: Server) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))  # bound and not listening: refused
            url = server.url().replace(str(server.port), str(free.getsockname()[1]))
            for form in (url, url.replace(":secret", "") + "?password=secret"):
                with pytest.raises(LedgerError, match="refused") as caught:
                    Ledger(form)
                assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)

    @pytest.mark.parametrize(("database", "user"), [("nowhere", "ledger"), ("postgres", "nobody")])
    def test_a_database_or_user_that_does_not_exist(self, server: Server, database: str, user: str) -> None:
        with pytest.raises(LedgerError, match="does not exist"):
            Ledger(server.url(database, user))

    def test_a_database_that_may_only_be_read(self, url: str, execute: Callable[[str], None]) -> None:
        with closing(Ledger(url)) as ledger:
            ledger.enter([entry(code(1), code(1))])
        execute("ALTER DATABASE one_test SET default_transaction_read_only = on")
        with closing(Ledger(url)) as ledger:
            with pytest.raises(LedgerError, match="read-only") as caught:
                ledger.enter([entry(code(1), code(2))])
            assert caught.value.do and ledger.exposure(code(1)) == Exposure(1, 50.0)
