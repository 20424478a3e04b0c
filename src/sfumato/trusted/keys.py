"""A tenant's key, 32 bytes, from a file, the environment or a PKCS#11 module; never shown, not even in an error.

    PATH, file:PATH     64 hexadecimal digits in a file
    env:NAME            64 hexadecimal digits in an environment variable
    pkcs11:token=T;object=O?module-path=M&pin-source=file:P
                        HMAC-SHA256 of "sfumato tenant key 1" under the generic secret O of the token T

The last is an address by RFC 7512. It reaches a hardware security module, or a key management service through the
module its provider ships. The secret stays there and may be non-extractable: the module computes the HMAC. `M` is the
module's absolute path, `P` a file with the user's PIN; `;id=%01` after `O` tells secrets of one label apart.

A file, of a key or of a PIN, is read only where nobody but its owner and root can read it, or could have put it there:

* it is a regular file of this user or root, and its mode gives nothing to group and others;
* every folder down to it, symbolic links resolved, is of this user or root too, and neither group nor others may write
  to it unless it is sticky, as /tmp is. A link itself may lie anywhere: it can only point to a file that passes.
"""

import hmac
import os
import re
import secrets
import shlex
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from sfumato.core.errors import OutputError, TenantKeyError
from sfumato.trusted.record import KEY_BYTES

T = TypeVar("T")

LABEL = b"sfumato tenant key 1"  # what a module computes the HMAC of; another label would be another key
_HEX = re.compile(rb"([0-9a-fA-F]{%d})(\r?\n)?" % (2 * KEY_BYTES))
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_WANTED = f"{2 * KEY_BYTES} hexadecimal digits"
_KINDS = "a path, file:PATH, env:NAME or pkcs11:token=T;object=O?module-path=M&pin-source=file:P"
_NEW = "sfumato key FILE"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not keep us waiting
_MAY_BE_A_KEY = 32  # a name of so many characters that nothing bears is not shown: it may be a key typed in its place
_PIN_BYTES = 1024


def tenant_key(uri: str) -> bytes:
    """The 32 bytes of the key at this address: a path, `file:`, `env:` or `pkcs11:`, see above.

    Raises TenantKeyError: another kind of address, nothing there, others can read or replace it, not 64 digits, all of
    them zero, or a module that does not give the key.
    """
    if uri.startswith("env:"):
        return _from_environment(uri.removeprefix("env:"))
    if uri.startswith("pkcs11:"):
        return _from_module(_parsed(uri.removeprefix("pkcs11:")))
    if _SCHEME.match(uri) and not uri.startswith("file:"):
        raise TenantKeyError("a tenant key at an address of another kind", wanted=_KINDS, do=f"{_NEW}; then name FILE")
    path = uri.removeprefix("file:")
    return _decoded(private(path, "tenant key", 2 * KEY_BYTES + 2), path)


def new_key_file(path: Path) -> None:
    """A new key from the operating system's random numbers, in a new file of mode 600 that `tenant_key` reads.

    Raises OutputError where a file is there already or none can be made, TenantKeyError where others could replace it.
    """
    do = "name a new file in a folder that exists and that you may write to"
    try:
        real = Path(os.path.realpath(path.parent)) / path.name
        _guarded(real)
        descriptor = os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise OutputError(f"{path} is there already", wanted="a new file: a key is never replaced", do=do) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be made: {_why(error)}", wanted="a new file", do=do) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(KEY_BYTES)}\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        real.unlink()
        raise OutputError(f"{path} cannot be written: {_why(error)}", wanted="a disk with room", do=do) from error


def _from_environment(name: str) -> bytes:
    try:
        text = os.environ[name]
    except (KeyError, ValueError):
        got = f"the environment variable{_if_no_key(name)} is not set"
        raise TenantKeyError(got, wanted=_WANTED, do="set it, or name another: env:NAME") from None
    return _decoded(os.fsencode(text), f"the environment variable {name}")


def _decoded(text: bytes, where: str) -> bytes:
    digits = _HEX.fullmatch(text)
    if not digits:
        raise TenantKeyError(f"{where} holds no tenant key", wanted=_WANTED, do=f"{_NEW} makes one")
    key = bytes.fromhex(digits[1].decode())
    if not any(key):
        raise TenantKeyError(f"{where} holds a tenant key of zeros", wanted="a secret one", do=f"{_NEW} makes one")
    return key


# Files


def private(path: str, what: str, size: int) -> bytes:
    """A file's first size + 1 bytes; errors call it `what`.

    Raises TenantKeyError where others could read it or put it there.
    """
    try:
        real = Path(os.path.realpath(path))
        _guarded(real)
        with open(real, "rb", opener=lambda name, _: os.open(name, _OPEN)) as file:
            _private(os.fstat(file.fileno()), real)
            return file.read(size + 1)
    except (OSError, ValueError) as error:
        known = path if os.path.isdir(os.path.dirname(path)) and len(os.path.basename(path)) < _MAY_BE_A_KEY else ""
        got = f"the file{f' {known}' if known else _if_no_key(path)} with the {what} cannot be read: {_why(error)}"
        raise TenantKeyError(got, wanted="a file of this user", do="name a file that is there") from None


def _guarded(real: Path) -> None:
    """Every folder down to `real`, a path without links, is one where others cannot replace what lies in it.

    Raises TenantKeyError, which shows the folder alone: `real` may be a key typed in place of a path.
    """
    for folder in real.parents:
        status = os.stat(folder)
        if status.st_uid not in (0, os.geteuid()):
            got, do = (
                f"a file below {folder}, which belongs to user {status.st_uid}",
                "name one in a folder of your own",
            )
        elif status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            got, do = f"a file below {folder}, where others can replace it", f"chmod go-w {shlex.quote(str(folder))}"
        else:
            continue
        raise TenantKeyError(got, wanted="folders that only this user or root can write to", do=do)


def _private(status: os.stat_result, real: Path) -> None:
    name = shlex.quote(str(real))
    if not stat.S_ISREG(status.st_mode):
        raise TenantKeyError(f"{real} is no regular file", wanted="a regular file", do=f"{_NEW} makes one")
    if status.st_uid not in (0, os.geteuid()):
        got = f"{real} belongs to user {status.st_uid}"
        raise TenantKeyError(got, wanted="a file of this user or of root", do=f"chown {os.geteuid()} {name}")
    if status.st_mode & 0o077:
        got = f"{real} is open to others: mode {stat.S_IMODE(status.st_mode):o}"
        raise TenantKeyError(got, wanted="a file that only its owner can read", do=f"chmod 600 {name}")


def _if_no_key(name: str) -> str:
    return f" {name}" if 0 < len(name) < _MAY_BE_A_KEY and name.isprintable() else ""


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


# PKCS#11


class _Address(NamedTuple):
    token: str
    label: str
    id: bytes | None
    module: str
    pin_file: str


# A token knows one login of a process, not of a thread: a second one at the same time is refused.
_one_login = threading.Lock()


def _parsed(text: str) -> _Address:
    """`token=..;object=..?module-path=..&pin-source=..`, each value percent-encoded (RFC 7512, section 2.3)."""
    path, _, query = text.partition("?")
    found: dict[str, str] = {}
    for name, value in (*_pairs(path, ";"), *_pairs(query, "&")):
        if name == "pin-value":
            got = "a PIN in an address, which process lists and a shell's history show"
            raise TenantKeyError(got, wanted="pin-source=file:P", do="write the PIN to a file P and chmod 600 P")
        if not value or name in found or name not in ("token", "object", "id", "module-path", "pin-source"):
            got = "a pkcs11 address with a part that is unknown, empty or there twice"
            raise TenantKeyError(got, wanted="token, object, id, module-path, pin-source", do=f"name {_KINDS}")
        found[name] = value
    missing = [name for name in ("token", "object", "module-path", "pin-source") if name not in found]
    if missing:
        raise TenantKeyError(f"a pkcs11 address without {' and '.join(missing)}", wanted=_KINDS, do="add it")
    try:
        token, label, module, pin = (
            unquote(found[name], errors="strict") for name in ("token", "object", "module-path", "pin-source")
        )
    except UnicodeDecodeError:
        raise TenantKeyError("a pkcs11 address that is not UTF-8", wanted=_KINDS, do="percent-encode UTF-8") from None
    if not pin.startswith("file:"):
        raise TenantKeyError("a pin-source that is no file", wanted="pin-source=file:P", do="write the PIN to a file P")
    if not os.path.isabs(module):
        got = "a module-path that is not absolute"
        raise TenantKeyError(got, wanted="the whole path", do="module-path=/usr/lib/softhsm/libsofthsm2.so")
    return _Address(token, label, unquote_to_bytes(found["id"]) if "id" in found else None, module, pin[5:])


def _pairs(text: str, between: str) -> Iterator[tuple[str, str]]:
    for part in text.split(between) if text else ():
        name, _, value = part.partition("=")
        yield name, value


def _pin(path: str) -> str:
    text = private(path, "PIN", _PIN_BYTES)
    try:
        pin = text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        pin = ""
    if not pin or len(text) > _PIN_BYTES:
        raise TenantKeyError(f"{path} holds no PIN", wanted="one line of UTF-8", do="write the user's PIN to it")
    return pin


def _from_module(address: _Address) -> bytes:
    try:
        import pkcs11
    except ImportError:
        got = "what speaks to PKCS#11 modules is not installed"
        raise TenantKeyError(got, wanted="python-pkcs11", do="pip install 'sfumato[hsm]'") from None
    pin = _pin(address.pin_file)
    if not os.path.isfile(address.module):
        do = "install the module (Debian, SoftHSM: apt-get install softhsm2), or correct module-path"
        raise TenantKeyError(f"no PKCS#11 module at {address.module}", wanted="the path of a library", do=do)
    with _one_login:
        try:
            pkcs11.lib(address.module)  # loaded once for the process, and kept
        except pkcs11.PKCS11Error as error:
            got = f"{address.module} does not start as a PKCS#11 module: {type(error).__name__}"
            raise TenantKeyError(got, wanted="a module that is set up", do="see the module's own manual") from error
        try:
            key = _hmac(address, pin)
        except pkcs11.PKCS11Error as error:
            raise _refused(type(error).__name__, address) from error
    # HMAC pads its key with zeros: this is what every secret of up to 64 zero bytes gives
    if len(key) != KEY_BYTES or hmac.compare_digest(key, hmac.digest(bytes(KEY_BYTES), LABEL, "sha256")):
        raise TenantKeyError(f"{address.label}: a secret of zeros", wanted="a secret one", do="make another one")
    return key


def _hmac(address: _Address, pin: str) -> bytes:
    import pkcs11
    from pkcs11 import Attribute

    tool = f"pkcs11-tool --module {shlex.quote(address.module)}"
    tokens = list(pkcs11.lib(address.module).get_tokens(token_label=address.token))
    token = _only(tokens, f"tokens of the label {address.token} in {address.module}", f"{tool} --list-token-slots")
    with token.open(user_pin=pin) as session:
        sought: dict[Attribute, Any] = {
            Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: pkcs11.KeyType.GENERIC_SECRET,
            Attribute.LABEL: address.label,
        }
        if address.id is not None:
            sought[Attribute.ID] = address.id
        # all of them: python-pkcs11's own get_key leaves a search open where there are several
        found = list(session.get_objects(sought))
        what = f"generic secrets {address.label} on the token {address.token}"
        secret = _only(found, what, f"{tool} --login --list-objects; ;id=%01 tells secrets of one label apart")
        size = secret[Attribute.VALUE_LEN]
        if size < KEY_BYTES or not isinstance(secret, pkcs11.SignMixin):
            got = f"{address.label}: a secret of {size} bytes, or one that may not sign"
            raise TenantKeyError(got, wanted=f"{KEY_BYTES} bytes or more, CKA_SIGN", do="make another one")
        return secret.sign(LABEL, mechanism=pkcs11.Mechanism.SHA256_HMAC)


def _only(found: list[T], what: str, do: str) -> T:
    if len(found) != 1:
        raise TenantKeyError(f"{len(found)} {what}", wanted="one", do=do)
    return found[0]


def _refused(error: str, address: _Address) -> TenantKeyError:
    """What the module's own error means, by its name."""
    if error.startswith("Pin") or error == "UserPinNotInitialized":
        got = f"the token {address.token} refuses the PIN in {address.pin_file}: {error}"
        do = "correct the file before trying again: tokens lock after a few wrong PINs"
        return TenantKeyError(got, wanted="the PIN of the token's user", do=do)
    got = f"{address.module} did not compute HMAC-SHA256 under {address.label}: {error}"
    do = "see the module's manual for what this error means"
    return TenantKeyError(got, wanted="a module with CKM_SHA256_HMAC, and no other login in this process", do=do)
