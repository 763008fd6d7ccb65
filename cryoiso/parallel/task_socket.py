"""How a small process that somebody else's program started hands its task to the ranks that wait, and gets the answer.

Rank 0 keeps a ``TaskServer``; a process with a task calls ``request``. On the same host they talk over a local socket
in a folder that only the user can enter, else over TCP, and where no connection comes about or lasts (networks between
nodes may be closed) through files in the run folder. Every message is signed with a secret that lies in a file that
only the user can read, over a number that the other side has just drawn: nobody else can hand in a task or an answer,
and nothing said before can be used again. Callers that have not shown the secret are few, have a deadline, and lose
their place to others first: they can neither use up the file descriptors nor end the run.

This module is imported by a process that must answer fast while MPI ranks wait for it: standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.parallel.private_socket import SOCKET, accept_all, listen, private_folder, surplus

_NONCE, _MAC, _LONGEST = 16, 32, 1 << 20
_ACCEPTED = b"\x06"
"""What the server says when it has a signed task: from now on a broken connection means that the ranks have ended."""
_HELLO_S = 20.0
"""Time that a caller has for its whole task; nobody holds up the server."""
MOST_CALLERS = 32
"""Callers that may be connected without having shown the secret."""
_LOOK_S = 0.05


class HandoverError(CryoisoError):
    """The ranks could not be reached, or are gone."""


@dataclass(frozen=True)
class Address:
    """Where a server is; in a file that only the user can read."""

    host: str
    local: str
    """path of the local socket, in a folder of mode 700; empty if there is none"""
    port: int
    numbers: tuple[str, ...]
    """IPv4 addresses of the host, the likeliest first"""
    secret: str
    drop: str
    """folder for tasks that come as files"""

    @classmethod
    def read(cls, file: Path) -> Address:
        """
        Raises:
            InputError: no such file, not such a file, or others may read it.
        """
        try:
            if os.stat(file).st_mode & 0o077:
                raise InputError("readable by other users", file=file, expected="mode 600", code="ranks-unreachable")
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "numbers": tuple(values["numbers"])})
        except FileNotFoundError:
            raise InputError("no ranks are waiting", file=file, code="ranks-unreachable") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"cannot be used: {error}", file=file, code="ranks-unreachable") from None

    def write(self, file: Path) -> None:
        part = file.with_name(f".{file.name}.part")
        with suppress(OSError):
            part.unlink()
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({**self.__dict__, "numbers": list(self.numbers)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)


class Call:
    """A task that somebody handed in; ``answer`` it once."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task

    def answer(self, ok: bool, message: str = "", code: str = "") -> None:
        raise NotImplementedError

    def gone(self) -> bool:
        """Whether the caller no longer waits."""
        return False


class _NotAccepted(Exception):
    """The connection ended before the server had the task: another way may lead there."""


class _Connection(Call):
    """A caller on a socket: is told a number, hands in its task, waits."""

    def __init__(self, connection: socket.socket, source: str, secret: bytes) -> None:
        super().__init__({})
        self._socket, self.source, self._secret = connection, source, secret
        self._nonce = secrets.token_bytes(_NONCE)
        self._theirs = b""
        self._buffer = b""
        self._until = time.monotonic() + _HELLO_S
        self.known = False
        connection.setblocking(False)
        with suppress(OSError):  # one that has left already is found by ``advance``
            connection.send(self._nonce)

    def advance(self) -> bool:
        """Reads what has come; False: nothing more will come of this caller."""
        while True:
            try:
                new = self._socket.recv(65536)
            except BlockingIOError:
                return self.known or time.monotonic() < self._until
            except OSError:
                return False
            if not new or self.known:
                return False  # one task per caller
            self._buffer += new
            if len(self._buffer) > _LONGEST or not self._read_task():
                return False

    def _read_task(self) -> bool:
        """Takes the task from the buffer if it is whole; False: it is not signed with the secret, or too long."""
        head = _NONCE + _MAC + 4
        if len(self._buffer) < head:
            return True
        length = int.from_bytes(self._buffer[_NONCE + _MAC : head], "big")
        if len(self._buffer) < head + length:
            return head + length <= _LONGEST
        self._theirs, mac, body = self._buffer[:_NONCE], self._buffer[_NONCE : _NONCE + _MAC], self._buffer[head:]
        if not hmac.compare_digest(mac, _sign(self._secret, b"task", self._nonce, self._theirs, body)):
            return False
        self.task, self.known = json.loads(body), True
        with suppress(OSError):
            self._socket.send(_ACCEPTED)
        return True

    def answer(self, ok: bool, message: str = "", code: str = "") -> None:
        body = json.dumps({"ok": ok, "message": message, "code": code}).encode()
        with suppress(OSError):
            self._socket.settimeout(_HELLO_S)
            self._socket.sendall(_framed(body, self._secret, b"answer", self._nonce, self._theirs))
        self.close()

    def gone(self) -> bool:
        return not self.advance()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.close()


class _Letter(Call):
    """A task that came as a file."""

    def __init__(self, file: Path, secret: bytes) -> None:
        nonce = bytes.fromhex(file.name.split(".")[0])
        super().__init__(json.loads(_opened(file.read_bytes(), secret, b"task", nonce)))
        self._file, self._secret, self._nonce = file, secret, nonce

    def answer(self, ok: bool, message: str = "", code: str = "") -> None:
        body = json.dumps({"ok": ok, "message": message, "code": code}).encode()
        part = self._file.with_suffix(".part")
        with suppress(OSError):
            part.write_bytes(_framed(body, self._secret, b"answer", self._nonce))
            os.replace(part, self._file.with_suffix(".answer"))


def _sign(secret: bytes, *parts: bytes) -> bytes:
    joined = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.new(secret, joined, hashlib.sha256).digest()


def _framed(body: bytes, secret: bytes, *about: bytes) -> bytes:
    return _sign(secret, *about, body) + len(body).to_bytes(4, "big") + body


def _opened(message: bytes, secret: bytes, *about: bytes) -> bytes:
    """The body of a framed message.

    Raises:
        HandoverError: cut short, or signed by somebody else.
    """
    mac, length, body = message[:_MAC], int.from_bytes(message[_MAC : _MAC + 4], "big"), message[_MAC + 4 :]
    if len(message) < _MAC + 4 or len(body) != length:
        raise HandoverError("the message was truncated", code="ranks-unreachable")
    if not hmac.compare_digest(mac, _sign(secret, *about, body)):
        raise HandoverError("the message was not signed with the secret of this run", code="ranks-unreachable")
    return body


class TaskServer:
    """Where tasks are handed in; looks for them when asked to, and never waits."""

    def __init__(self, file: Path, numbers: Sequence[str]) -> None:
        """Opens a server and tells in ``file`` where it is.

        Args:
            file: in a folder that all callers see; nothing of an earlier server is left there.
            numbers: IPv4 addresses of this host, the likeliest first; none: same host only.
        """
        self._file = file
        self._secret = secrets.token_bytes(32)
        self._drop = file.with_name(file.name + ".drop")
        shutil.rmtree(self._drop, ignore_errors=True)
        self._drop.mkdir(mode=0o700)
        self._doors: list[socket.socket] = []
        self._room = private_folder("desk")
        local = ""
        if self._room is not None:
            with suppress(OSError):  # the other ways are left
                self._doors.append(listen(socket.AF_UNIX, str(self._room / SOCKET)))
                local = str(self._room / SOCKET)
        port = 0
        if numbers:
            self._doors.append(listen(socket.AF_INET, ("", 0)))
            port = int(self._doors[-1].getsockname()[1])
        self._callers: list[_Connection] = []
        self._waiting: list[_Connection] = []
        self._seen: set[str] = set()
        self._host = socket.gethostname()
        address = Address(self._host, local, port, tuple(numbers), self._secret.hex(), str(self._drop.absolute()))
        address.write(file)

    def look(self) -> list[Call]:
        """The tasks that came since the last look."""
        for door in self._doors:
            for connection, source in accept_all(door, MOST_CALLERS):
                self._callers.append(_Connection(connection, source, self._secret))
        calls: list[Call] = []
        for caller in list(self._callers):
            if not caller.advance():
                caller.close()
                self._callers.remove(caller)
            elif caller.known:
                calls.append(caller)
                self._callers.remove(caller)
                self._waiting.append(caller)
        for index in sorted(surplus([caller.source for caller in self._callers], MOST_CALLERS), reverse=True):
            self._callers.pop(index).close()
        return calls + self._letters()

    def _letters(self) -> list[Call]:
        letters: list[Call] = []
        with suppress(OSError):
            for name in sorted(os.listdir(self._drop)):
                if name.endswith(".task") and name not in self._seen:
                    self._seen.add(name)
                    with suppress(HandoverError, ValueError, OSError):
                        letters.append(_Letter(self._drop / name, self._secret))
        return letters

    def close(self) -> None:
        """Nobody waits any more: callers that were not answered fail."""
        with suppress(OSError):
            self._file.unlink()
        for caller in self._callers + self._waiting:
            caller.close()
        for door in self._doors:
            door.close()
        self._callers, self._waiting = [], []
        shutil.rmtree(self._drop, ignore_errors=True)
        if self._room is not None:
            shutil.rmtree(self._room, ignore_errors=True)


def request(file: Path, task: dict[str, Any], *, limit_s: float | None = None, connect_s: float = 5.0) -> str:
    """Hands a task to a server and waits for the answer.

    Args:
        file: that the server wrote.
        task: plain values.
        limit_s: wait no longer; None: as long as the server is there.
        connect_s: for each way of getting there.

    Returns:
        the message of the answer.

    Raises:
        InputError: no server.
        HandoverError: the answer is no, the server is gone, or the time is over.
    """
    address = Address.read(file)
    secret, body = bytes.fromhex(address.secret), json.dumps(task).encode()
    until = None if limit_s is None else time.monotonic() + limit_s
    answer, connection = None, _connect(address, connect_s)
    if connection is not None:
        with connection, suppress(_NotAccepted):
            answer = _by_wire(connection, secret, body, until)
    if answer is None:
        answer = _by_letter(file, address, secret, body, until)
    reply = json.loads(answer)
    if not reply["ok"]:
        raise HandoverError(reply["message"], code=reply.get("code") or "ranks-unreachable")
    return str(reply["message"])


def _connect(address: Address, connect_s: float) -> socket.socket | None:
    """A connection to the server, or None where there is no way."""
    if address.local and address.host == socket.gethostname():
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(connect_s)
        with suppress(OSError):
            connection.connect(address.local)
            return connection
        connection.close()
    for number in address.numbers if address.port else ():
        with suppress(OSError):
            connection = socket.create_connection((number, address.port), connect_s)
            if _is_server(connection, connect_s):
                _notice_dead_hosts(connection)
                return connection
            connection.close()
    return None


def _is_server(connection: socket.socket, limit_s: float) -> bool:
    """Whether something at the other end speaks first, as a server does; an address of a bridge may lead elsewhere."""
    connection.settimeout(limit_s)
    try:
        return len(connection.recv(1, socket.MSG_PEEK)) == 1
    except OSError:
        return False


def _notice_dead_hosts(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _by_wire(connection: socket.socket, secret: bytes, body: bytes, until: float | None) -> bytes:
    """The answer to a task over a connection.

    Raises:
        _NotAccepted: it ended before the server had the task.
        HandoverError: it ended afterwards, or the time is over.
    """
    own_nonce, accepted = secrets.token_bytes(_NONCE), False
    try:
        connection.settimeout(_HELLO_S)
        theirs = _receive(connection, _NONCE)
        connection.sendall(own_nonce + _framed(body, secret, b"task", theirs, own_nonce))
        connection.settimeout(None if until is None else max(until - time.monotonic(), 1e-3))
        accepted = _receive(connection, 1) == _ACCEPTED
        head = _receive(connection, _MAC + 4)
        rest = _receive(connection, min(int.from_bytes(head[_MAC:], "big"), _LONGEST))
        return _opened(head + rest, secret, b"answer", theirs, own_nonce)
    except OSError as error:
        if isinstance(error, TimeoutError) and until is not None and time.monotonic() >= until:
            raise HandoverError("no answer from the ranks in time", code="ranks-unreachable") from None
        if not accepted:
            raise _NotAccepted from None
        raise HandoverError(f"the connection to the ranks broke: {error}", code="ranks-unreachable") from None


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        new = connection.recv(count - len(received))
        if not new:
            raise ConnectionResetError("the ranks have ended")
        received += new
    return received


def _by_letter(file: Path, address: Address, secret: bytes, body: bytes, until: float | None) -> bytes:
    """Through the drop folder; the server is gone when the file that announced it is gone or another's."""
    nonce = secrets.token_bytes(_NONCE)
    letter = Path(address.drop) / f"{nonce.hex()}.task"
    part = letter.with_suffix(".new")
    try:
        part.write_bytes(_framed(body, secret, b"task", nonce))
        os.replace(part, letter)
    except OSError as error:
        raise HandoverError(f"the ranks cannot be reached: {error}", code="ranks-unreachable") from None
    answer, pause = letter.with_suffix(".answer"), _LOOK_S
    while not answer.exists():
        if until is not None and time.monotonic() > until:
            raise HandoverError("no answer from the ranks in time", code="ranks-unreachable")
        if not file.exists() or Address.read(file).secret != address.secret:
            raise HandoverError("the ranks have ended", code="ranks-unreachable")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return _opened(answer.read_bytes(), secret, b"answer", nonce)
