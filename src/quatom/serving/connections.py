"""What a server listens on and whom it lets in, checked before a model is loaded."""

import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quatom.errors import ServerError

_ORIGIN = re.compile(r"https?://[^/\s?#*]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A certificate chain and its private key, as PEM files."""

    certfile: Path
    keyfile: Path


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that owns its address but refuses connections until a server runs on it.

    Args:
        host: name or address of this machine, IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        ServerError: the address is not of this machine, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"cannot listen on {host!r}: {error}; give --host an address") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Connections of the last server that have not timed out yet are no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # With the option on, a second server could bind as long as nobody listens. `serve_engine`
        # turns it on again, since to listen takes another look at those old connections.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        listener.close()
        raise ServerError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or "
            "--port, or stop what uses it"
        ) from error
    return listener


def url_of(listener: socket.socket, tls: Tls | None) -> str:
    """The address that a listener is reached at."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def read_tls(certfile: Path | None, keyfile: Path | None) -> Tls | None:
    """Check that both files are there and belong together; None if neither is given.

    Raises:
        ServerError: one is missing, unreadable or encrypted, or the key is another certificate's.
    """
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        raise ServerError("--ssl-certfile and --ssl-keyfile belong together: give both or neither")
    for path in (certfile, keyfile):
        try:
            path.read_bytes()
        except OSError as error:
            raise ServerError(f"cannot read {path}: {error.strerror}") from error
    try:
        # The empty password keeps OpenSSL from asking for one on the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            certfile, keyfile, password=lambda: ""
        )
    except (ssl.SSLError, ValueError) as error:
        raise ServerError(
            f"{certfile} and {keyfile} are no certificate chain and its key, both in PEM and the "
            f"key without a password: {error}"
        ) from error
    return Tls(certfile=certfile, keyfile=keyfile)


def read_api_keys(
    given: Sequence[str] | None, file: Path | None, environment: str | None
) -> tuple[str, ...]:
    """The keys that requests may use; none: everybody may.

    Args:
        given: on the command line.
        file: one key on each line; empty lines and lines that begin with # are left out.
        environment: a single key, used if the others name none; empty counts as not set.

    Raises:
        ServerError: a key is empty or cannot be sent in a header, or the file has no key.
    """
    keys = list(given or ())
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ServerError(f"cannot read the API keys in {file}: {error}") from error
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise ServerError(f"{file} holds no API key: write one on each line")
        keys += in_file
    if not keys and environment:
        keys = [environment]
    for number, key in enumerate(keys, start=1):
        if not key or key != key.strip() or not key.isprintable():
            raise ServerError(
                f"API key {number} of {len(keys)} is empty, begins or ends with a space or has "
                "control characters: no client could send it"
            )
    return tuple(dict.fromkeys(keys))


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Origins of pages that may use the server from a browser, as browsers write them.

    Raises:
        ServerError: one is neither * nor of the form scheme://host[:port].
    """
    given = tuple(origins)
    for origin in given:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ServerError(
                f"--allowed-origins {origin!r} is no origin: write * or scheme://host[:port], for "
                "example https://chat.example.org"
            )
    return tuple(_as_browsers_write(origin.lower()) for origin in given)


def _as_browsers_write(origin: str) -> str:
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80")
