"""A tenant's key comes from a private file, the environment or a real PKCS#11 module, and no error shows any of it."""

import base64
import hmac
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.errors import OutputError, TenantKeyError
from sfumato.trusted import keys
from sfumato.trusted.keys import new_key_file, tenant_key

KEY = bytes(range(7, 39))
VARIABLE = "SFUMATO_TEST_TENANT_KEY"
ANOTHER_USER = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def write(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def refusal(uri: str) -> str:
    with pytest.raises(TenantKeyError) as caught:
        tenant_key(uri)
    assert caught.value.exit_code == 2
    assert caught.value.wanted and caught.value.do
    return str(caught.value)


# Files


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_by_path_and_by_address(tmp_path: Path, end: str, mode: int) -> None:
    path = write(tmp_path / "k", KEY.hex().upper() + end, mode)
    assert tenant_key(str(path)) == tenant_key(f"file:{path}") == KEY


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "k", KEY.hex())
    monkeypatch.chdir(tmp_path)
    assert tenant_key("k") == tenant_key("file:./k") == KEY


@pytest.mark.parametrize("mode", [0o601, 0o602, 0o604, 0o610, 0o620, 0o640, 0o644, 0o660, 0o777])
def test_a_file_open_to_others(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "k", KEY.hex(), mode)
    assert f"do: chmod 600 {path}" in refusal(str(path))


@root_only
def test_a_file_of_another_user(tmp_path: Path) -> None:
    path = write(tmp_path / "k", KEY.hex())
    os.chown(path, ANOTHER_USER, -1)
    said = refusal(str(path))
    assert f"belongs to user {ANOTHER_USER}" in said and f"do: chown 0 {path}" in said


@root_only
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    for made in (folder, folder / "deep"):
        made.mkdir(mode=0o700)
    path = write(folder / "deep" / "k", KEY.hex())
    os.chown(folder, ANOTHER_USER, -1)
    assert f"{folder}, which belongs to user {ANOTHER_USER}" in refusal(str(path))
    with pytest.raises(TenantKeyError):
        new_key_file(folder / "deep" / "new")
    assert not (folder / "deep" / "new").exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_others_can_write_to(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    for made in (folder, folder / "deep"):
        made.mkdir(mode=0o700)
    path = write(folder / "deep" / "k", KEY.hex())
    folder.chmod(mode)
    assert f"do: chmod go-w {folder}" in refusal(str(path))
    folder.chmod(mode | 0o1000)  # sticky: others can add files and replace none
    assert tenant_key(str(path)) == KEY


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    for name in ("open", "mine", "links"):
        (tmp_path / name).mkdir(mode=0o700)
    good, bad = write(tmp_path / "mine" / "k", KEY.hex()), write(tmp_path / "open" / "k", KEY.hex())
    (tmp_path / "links" / "good").symlink_to(good)
    (tmp_path / "links" / "bad").symlink_to(bad)
    (tmp_path / "links" / "loop").symlink_to("loop")
    (tmp_path / "links" / "folder").symlink_to(tmp_path / "open")
    (tmp_path / "open").chmod(0o777)
    assert tenant_key(str(tmp_path / "links" / "good")) == KEY
    for name in ("bad", "loop", "folder/k"):
        refusal(str(tmp_path / "links" / name))
    good.chmod(0o640)
    assert f"chmod 600 {good}" in refusal(str(tmp_path / "links" / "good"))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", "/dev/null", "", "a\0b", "\ud800"):
        refusal(str(path))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'} with the tenant key cannot be read: No such file" in refusal(
        str(tmp_path / "absent")
    )


# The digits


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "k"


DIGITS = st.text("0123456789abcdefABCDEF", max_size=70).map(str.encode)
MALFORMED = st.one_of(
    st.binary(max_size=80),
    DIGITS,
    st.tuples(st.integers(0, 63), st.sampled_from([b"g", b" ", b"\n", b"\xc2\xb2", b"\xef\xbc\x91", b"\0", b"0x"])).map(
        lambda at: KEY.hex().encode()[: at[0]] + at[1] + KEY.hex().encode()[at[0] + 1 :]
    ),
    st.sampled_from([b"\n", b" ", b"\n\n", b"\r", b"00", b"\n0"]).map(lambda end: KEY.hex().encode() + b"\n" + end),
).filter(lambda text: not re.fullmatch(rb"[0-9a-fA-F]{64}(\r?\n)?", text))


@given(MALFORMED)
def test_no_error_depends_on_what_a_malformed_file_holds(file: Path, text: bytes) -> None:
    said = refusal(str(write(file, text)))
    assert said == f"{file} holds no tenant key\n  wanted: 64 hexadecimal digits\n  do: sfumato key FILE makes one"


@given(MALFORMED.filter(lambda text: b"\0" not in text))
def test_no_error_depends_on_what_a_malformed_variable_holds(text: bytes) -> None:
    os.environ[VARIABLE] = os.fsdecode(text)
    try:
        said = refusal(f"env:{VARIABLE}")
    finally:
        del os.environ[VARIABLE]
    assert said.startswith(f"the environment variable {VARIABLE} holds no tenant key\n")


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_every_other_key_is_read(file: Path, key: bytes) -> None:
    assert tenant_key(str(write(file, key.hex()))) == key


def test_zeros_are_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0" * 64)
    assert "of zeros" in refusal(f"env:{VARIABLE}")
    assert "of zeros" in refusal(str(write(tmp_path / "k", "0" * 64)))


# Addresses


def test_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY.hex())
    assert tenant_key(f"env:{VARIABLE}") == KEY
    monkeypatch.delenv(VARIABLE)
    assert f"{VARIABLE} is not set" in refusal(f"env:{VARIABLE}")
    refusal("env:")


@pytest.mark.parametrize("uri", ["vault:secret/tenant", "https://keys.example/1", "PKCS11:token=a", "a:b"])
def test_another_scheme_lists_those_there_are(uri: str) -> None:
    said = refusal(uri)
    assert all(kind in said for kind in ("file:PATH", "env:NAME", "pkcs11:"))


@given(st.binary(min_size=32, max_size=48))
def test_a_key_typed_in_place_of_its_address_is_not_shown(key: bytes) -> None:
    spelled = (key.hex(), f"0x{key.hex()}", key.hex(":"), base64.b64encode(key).decode())
    for text in (*spelled, base64.urlsafe_b64encode(key).decode()):
        for uri in (text, f"file:{text}", f"./{text}", f"env:{text}", f"pkcs11:{text}", f"pkcs11:token={text}"):
            said = refusal(uri)
            assert not [at for at in range(len(text) - 7) if text[at : at + 8] in said]


# New files


def test_a_new_key_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        new_key_file(tmp_path / "a")
        new_key_file(tmp_path / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", (tmp_path / "a").read_text())
    assert tenant_key(str(tmp_path / "a")) != tenant_key(str(tmp_path / "b"))


def test_a_new_key_replaces_nothing(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept", KEY.hex())
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("kept", "link", "dangling", ".", "no/such/folder", "kept/below"):
        with pytest.raises(OutputError):
            new_key_file(tmp_path / name)
    assert kept.read_text() == KEY.hex()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "kept", "link"]


def test_a_new_key_on_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        new_key_file(tmp_path / "k")
    assert not (tmp_path / "k").exists()


# PKCS#11


def address(**parts: str) -> str:
    path = ";".join(f"{name}={quote(parts[name])}" for name in ("token", "object", "id") if name in parts)
    query = "&".join(f"{name}={value}" for name, value in parts.items() if name not in ("token", "object", "id"))
    return f"pkcs11:{path}?{query}"


WHOLE = {"token": "t", "object": "o", "module-path": "/absent.so", "pin-source": "file:/absent/pin"}


@pytest.mark.parametrize("absent", WHOLE)
def test_every_part_of_an_address_is_needed(absent: str) -> None:
    said = refusal(address(**{name: value for name, value in WHOLE.items() if name != absent}))
    assert f"without {absent}" in said


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (address(**WHOLE) + "&pin-value=123456", "pin-source=file:P"),
        (address(**WHOLE) + "&module-name=softhsm", "unknown"),
        (address(**WHOLE) + "&pin-source=file:/b", "twice"),
        (address(**WHOLE).replace("token=t", "token="), "empty"),
        (address(**WHOLE).replace("token=t", "token=%ff"), "UTF-8"),
        (address(**WHOLE).replace("/absent.so", "absent.so"), "absolute"),
        (address(**WHOLE).replace("file:/absent/pin", "|echo 123456"), "no file"),
        (address(**WHOLE).replace("file:/absent/pin", "123456"), "no file"),
    ],
)
def test_an_address_that_cannot_be_used(uri: str, says: str) -> None:
    said = refusal(uri)
    assert says in said and "123456" not in said


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    assert "do: pip install 'sfumato[hsm]'" in refusal(address(**WHOLE))


class Tokens:
    """SoftHSM with a folder of its own; the token `tenant` and two named `twin`."""

    def __init__(self, folder: Path, module: Path) -> None:
        self.module, self.pin = str(module), write(folder / "pin", "user-pin-1\n")
        (folder / "tokens").mkdir()
        write(folder / "softhsm2.conf", f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
        os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
        for label in ("tenant 1", "twin", "twin"):
            words = ["--init-token", "--free", "--label", label, "--pin", "user-pin-1", "--so-pin", "officer-pin-1"]
            subprocess.run(["softhsm2-util", *words], check=True, capture_output=True)

    def store(self, label: str, value: bytes | None, **more: Any) -> None:
        """A generic secret that never leaves: this value, or a random one of 32 bytes."""
        import pkcs11

        A = pkcs11.Attribute
        common = {A.LABEL: label, A.TOKEN: True, A.PRIVATE: True, A.SENSITIVE: True, A.EXTRACTABLE: False, A.SIGN: True}
        common |= {A[name]: given for name, given in more.items()}
        with pkcs11.lib(self.module).get_token(token_label="tenant 1").open(rw=True, user_pin="user-pin-1") as session:
            if value is None:
                session.generate_key(pkcs11.KeyType.GENERIC_SECRET, 256, template=common)
            else:
                kind = {A.CLASS: pkcs11.ObjectClass.SECRET_KEY, A.KEY_TYPE: pkcs11.KeyType.GENERIC_SECRET}
                session.create_object({**kind, **common, A.VALUE: value})

    def address(self, label: str, **other: str) -> str:
        parts = {"token": "tenant 1", "object": label, "module-path": self.module, "pin-source": f"file:{self.pin}"}
        return address(**{**parts, **{name.replace("_", "-"): value for name, value in other.items()}})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed: pip install 'sfumato[hsm]'")
    places = ("/usr/lib/softhsm", "/usr/lib64/softhsm", "/usr/local/lib/softhsm", "/opt/homebrew/lib/softhsm")
    found = [Path(place, "libsofthsm2.so") for place in places if Path(place, "libsofthsm2.so").exists()]
    if not found or not shutil.which("softhsm2-util"):
        pytest.skip("no libsofthsm2.so and softhsm2-util here: apt-get install softhsm2")
    before = os.environ.get("SOFTHSM2_CONF")
    yield Tokens(tmp_path_factory.mktemp("softhsm"), found[0])
    pkcs11.unload(str(found[0]))
    os.environ.pop("SOFTHSM2_CONF")
    if before is not None:
        os.environ["SOFTHSM2_CONF"] = before


@pytest.mark.parametrize("size", [32, 48, 64, 100])
def test_a_module_gives_the_hmac_of_the_label(tokens: Tokens, size: int) -> None:
    secret = bytes(range(1, size + 1))
    tokens.store(f"known {size}", secret)
    assert tenant_key(tokens.address(f"known {size}")) == hmac.digest(secret, b"sfumato tenant key 1", "sha256")


def test_a_secret_that_never_left_its_module_gives_one_key(tokens: Tokens) -> None:
    import pkcs11

    tokens.store("made there", None)
    tokens.store("made there too", None)
    with pkcs11.lib(tokens.module).get_token(token_label="tenant 1").open(user_pin="user-pin-1") as session:
        secret = session.get_key(label="made there")
        with pytest.raises(pkcs11.AttributeSensitive):
            secret[pkcs11.Attribute.VALUE]
    first = tenant_key(tokens.address("made there"))
    assert len(first) == 32 and first == tenant_key(tokens.address("made there"))
    assert first != tenant_key(tokens.address("made there too"))


def test_another_process_gets_the_same_key_and_ends_well(tokens: Tokens) -> None:
    tokens.store("shared", None)
    code = "import sys; from sfumato.trusted.keys import tenant_key; print(tenant_key(sys.argv[1]).hex())"
    source = Path(keys.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tokens.address("shared")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
    )
    assert done.stdout.strip() == tenant_key(tokens.address("shared")).hex()


def test_threads_take_turns(tokens: Tokens) -> None:
    tokens.store("threads", None)
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(tenant_key(tokens.address("threads")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and len(set(got)) == 1


def test_the_identifier_tells_secrets_of_one_label_apart(tokens: Tokens) -> None:
    for n in (1, 2):
        tokens.store("same", bytes([n]) * 32, ID=bytes([0xF0, n]))
    assert "2 generic secrets same on" in refusal(tokens.address("same"))
    for n in (1, 2):
        key = tenant_key(tokens.address("same").replace("object=same", f"object=same;id=%F0%0{n}"))
        assert key == hmac.digest(bytes([n]) * 32, b"sfumato tenant key 1", "sha256")


def test_a_wrong_pin_is_refused_and_the_right_one_still_works(tokens: Tokens, tmp_path: Path) -> None:
    tokens.store("pin", None)
    wrong = write(tmp_path / "pin", "not-the-pin\n")
    said = refusal(tokens.address("pin", pin_source=f"file:{wrong}"))
    assert f"refuses the PIN in {wrong}: PinIncorrect" in said and "before trying again" in said
    assert "not-the-pin" not in said
    assert tenant_key(tokens.address("pin")) == tenant_key(tokens.address("pin"))


def test_a_pin_file_is_as_private_as_a_key(tokens: Tokens, tmp_path: Path) -> None:
    pin = write(tmp_path / "pin", "user-pin-1", 0o644)
    assert f"do: chmod 600 {pin}" in refusal(tokens.address("any", pin_source=f"file:{pin}"))
    for text in (b"", b"\n", b"\xff\xfe", b"1" * 2000):
        assert "holds no PIN" in refusal(tokens.address("any", pin_source=f"file:{write(pin, text)}"))
    assert "with the PIN cannot be read" in refusal(tokens.address("any", pin_source=f"file:{tmp_path / 'no'}"))


def test_what_a_module_does_not_have(tokens: Tokens, tmp_path: Path) -> None:
    assert "0 tokens of the label other" in refusal(tokens.address("any", token="other"))
    assert "2 tokens of the label twin" in refusal(tokens.address("any", token="twin"))
    assert "0 generic secrets absent on the token tenant 1" in refusal(tokens.address("absent"))
    said = refusal(tokens.address("any", module_path=str(tmp_path / "absent.so")))
    assert f"no PKCS#11 module at {tmp_path / 'absent.so'}" in said and "softhsm2" in said
    assert "does not start as a PKCS#11 module" in refusal(tokens.address("any", module_path=__file__))


def test_a_secret_of_another_kind_is_no_generic_secret(tokens: Tokens) -> None:
    import pkcs11

    with pkcs11.lib(tokens.module).get_token(token_label="tenant 1").open(rw=True, user_pin="user-pin-1") as session:
        session.generate_key(pkcs11.KeyType.AES, 256, label="aes", store=True)
    assert "0 generic secrets aes" in refusal(tokens.address("aes"))


def test_secrets_too_weak_or_not_for_signing(tokens: Tokens) -> None:
    tokens.store("short", b"s" * 31)
    tokens.store("zeros", bytes(32))
    tokens.store("more zeros", bytes(64))
    tokens.store("mute", b"m" * 32, SIGN=False)
    assert "a secret of 31 bytes" in refusal(tokens.address("short"))
    assert "a secret of zeros" in refusal(tokens.address("zeros"))
    assert "a secret of zeros" in refusal(tokens.address("more zeros"))
    assert "may not sign" in refusal(tokens.address("mute"))


def test_a_login_of_this_process_elsewhere_is_named_as_the_cause(tokens: Tokens) -> None:
    import pkcs11

    tokens.store("busy", None)
    with pkcs11.lib(tokens.module).get_token(token_label="tenant 1").open(user_pin="user-pin-1"):
        assert "no other login in this process" in refusal(tokens.address("busy"))
    assert len(tenant_key(tokens.address("busy"))) == 32
