"""JSON over HTTP with a server that may be busy, slow, dying or wrong: bounded retries, time-outs and answers.

Only the standard library; no proxies, no redirects, nothing but the address that was given.

What is asked again: a connection that was refused or lost, and the answers in `BUSY`, up to `TRIES` times in all, after
0.5, 1, 2, 4, ... seconds (half of that to all of it, by chance; a server's own Retry-After stands, up to
`LONGEST_WAIT`). A time-out is asked again once. Anything else is `Refused` at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from patarm_lite.errors import UserError

BUSY = (408, 425, 429, 500, 502, 503, 504)
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds."""
CONNECT = 10.0
"""Seconds for a connection to come about."""
LARGEST = 64 << 20
"""Bytes of an answer. A larger one is not read."""
SHOWN = 300
"""Characters of a server's own words in a message of ours."""


class Refused(Exception):
    """The server answered, and asking again would not change it."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


class Unreachable(UserError):
    """No usable answer, after as many tries as were allowed."""


class _Again(Exception):
    """A try that failed and may be made again. `least`: seconds the server asked for."""

    def __init__(self, why: str, least: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.least = why, least


class _Slow(_Again):
    """A try that ran out of time."""


class Endpoint:
    """A server under one address. Each thread that asks has a connection of its own.

    Args:
        url: `http://HOST[:PORT][/PATH]` or https; what is asked for is under its path.
        key: sent as `Authorization: Bearer KEY`.
        timeout: seconds that an answer may take.
        first_wait: seconds before the second try; doubled each time.

    Raises:
        UserError: an address that can't be used.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 600.0, first_wait: float = FIRST_WAIT
    ) -> None:
        self.url = clean_url(url)
        self.timeout, self.first_wait = timeout, first_wait
        parts = urlsplit(self.url)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise UserError("the server's key holds characters that a header can't carry; check how it was given")
            self._headers["Authorization"] = f"Bearer {key}"
        self._mine = threading.local()
        self._all: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._aborted = False

    def ask(
        self, path: str, body: dict[str, Any] | None = None, tries: int = TRIES, busy: Collection[int] = BUSY
    ) -> Any:
        """The JSON answer to a POST of `body`, or to a GET where there is none.

        Args:
            path: behind the address's own path; one that begins with `//` stands at the server's root.
            tries: at most.
            busy: statuses after which it is asked again.

        Raises:
            Refused: an answer that is no success and no matter of waiting.
            Unreachable: none, for the reason told.
        """
        data = None if body is None else json.dumps(body, ensure_ascii=True).encode("ascii")
        target = path[1:] if path.startswith("//") else self._path + path
        slow = 0
        for number in range(1, tries + 1):
            try:
                return self._try(target, data, busy)
            except _Again as failed:
                slow += isinstance(failed, _Slow)
                if number == tries or slow == 2 or self._stopped.is_set():
                    times = "" if number == 1 else f", tried {number} times"
                    raise Unreachable(f"{self.url} gave no answer: {failed.why}{times}") from None
                wait = self.first_wait * 2 ** (number - 1) * random.uniform(0.5, 1.0)
                if self._stopped.wait(min(max(wait, failed.least), LONGEST_WAIT)):
                    raise Unreachable(f"{self.url} gave no answer: {failed.why}") from None
        raise ValueError(f"{tries} tries")

    def give_up(self) -> None:
        """Let what is asked now be answered, but try nothing again."""
        self._stopped.set()

    @property
    def given_up(self) -> bool:
        """Whether `give_up` or `abort` was called."""
        return self._stopped.is_set()

    def abort(self) -> None:
        """End every connection; threads that wait for an answer get an error."""
        self._stopped.set()
        with self._lock:
            self._aborted = True
            found, self._all = self._all, set()
        for connection in found:
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections. Only when no thread asks any more."""
        self.abort()

    def _try(self, target: str, data: bytes | None, busy: Collection[int]) -> Any:
        connection, used = self._connection()
        try:
            status, headers, raw = self._exchange(connection, target, data)
        except ssl.SSLCertVerificationError as error:
            self._drop(connection)
            raise Unreachable(f"{self.url} has a certificate that is not trusted: {error.verify_message}") from None
        except TimeoutError:
            self._drop(connection)
            raise _Slow(f"nothing whole within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            if used and not self._stopped.is_set():
                return self._try(target, data, busy)  # it was closed while idle: that is no failure of this try
            raise _Again(_words(error)) from None
        if not 200 <= status < 300:
            said = _message(raw)
            if status in busy:
                raise _Again(f"status {status}{': ' if said else ''}{said}", _seconds(headers.get("Retry-After")))
            if 300 <= status < 400:
                said = f"it points to {headers.get('Location', 'nowhere')[:SHOWN]!r}; give that address"
            raise Refused(status, said or "without a reason")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused(status, f"an answer that is no JSON: {raw[:80]!r}") from None

    def _exchange(
        self, connection: http.client.HTTPConnection, target: str, data: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        last = time.monotonic() + self.timeout
        connection.request("GET" if data is None else "POST", target, data, self._headers)
        answer = connection.getresponse()
        raw = bytearray()
        while block := answer.read1(1 << 16):
            raw += block
            if len(raw) > LARGEST:
                self._drop(connection)
                raise Refused(answer.status, f"an answer of more than {LARGEST >> 20} MiB")
            if time.monotonic() > last:
                raise TimeoutError
        if answer.length:
            raise http.client.IncompleteRead(bytes(raw), answer.length)
        answer.close()  # the connection takes no further request before
        if connection.sock is None:  # the server keeps no connections
            self._drop(connection)
        return answer.status, answer.headers, bytes(raw)

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether it was used before."""
        known: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if known is not None and known.sock is not None:
            return known, True
        if self._tls is None:
            made = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT)
        else:
            made = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT, context=self._tls)
        try:
            made.connect()
        except TimeoutError:
            raise _Slow(f"no connection within {CONNECT:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(f"{self.url} has a certificate that is not trusted: {error.verify_message}") from None
        except (OSError, UnicodeError) as error:
            raise _Again(_words(error)) from None
        made.sock.settimeout(self.timeout)
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._aborted:
                made.close()
                raise _Again("it was given up")
            self._all.add(made)
        self._mine.connection = made
        return made, False

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._all.discard(connection)
        connection.close()
        self._mine.connection = None


def clean_url(url: str) -> str:
    """An address without its last slash, checked.

    >>> clean_url("http://localhost:8080/v1/")
    'http://localhost:8080/v1'

    Raises:
        UserError: no http or https address, or one that holds a password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"address {url!r} can't be read: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise UserError("an address with a name or password in it would be shown in messages; give the key apart")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isprintable() or " " in url:
        raise UserError(f"address {url!r} is none of a server; write it like http://localhost:8080/v1")
    if parts.query or parts.fragment:
        raise UserError(f"address {url!r} may have no '?' and no further '#'; write it like http://localhost:8080/v1")
    return url.rstrip("/")


def _words(error: BaseException) -> str:
    """A reason in a few words: 'connection refused', 'the connection was lost'."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused (is it running?)"
    if isinstance(error, ConnectionError | http.client.HTTPException):
        return "the connection was lost"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    return _line(str(error)) or type(error).__name__


def _message(raw: bytes) -> str:
    """What an error's body says: OpenAI's `error.message`, FastAPI's `detail`, or its text."""
    text = raw[:100_000].decode("utf-8", "replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _line(text)
    if isinstance(data, dict):
        found = data.get("error", data.get("detail", data.get("message", data)))
        found = found.get("message", found) if isinstance(found, dict) else found
        return _line(found if isinstance(found, str) else json.dumps(found))
    return _line(text)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in line)[:SHOWN]


def _seconds(said: str | None) -> float:
    """A Retry-After in seconds; a date is not read."""
    try:
        return max(0.0, min(float(said or 0), LONGEST_WAIT))
    except ValueError:
        return 0.0
