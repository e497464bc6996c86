"""The raw limit: a server that does nothing but send a raw file to its socket.

A thread per connection, simple replies, ``sendfile`` straight from the page cache: no checks,
no format, no fairness, no limits. What it reaches with a client is what the kernel and the
client allow; the streaming rows show ours beside it.

Asked to be ``writable``, it also writes what it is told to, straight over what is being sent: what
a guest's writes beside a pull cost at least. Asked to be ``copying``, it reads into memory and
sends from there: what rule 1 of the design leaves where bytes may be overwritten.

``python -m benchmark.raw_limit SOCKET FILE [writable] [copying]``; SOCKET is a path, or a TCP port
of 127.0.0.1. Every export's name is that of the file.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from functools import partial
from typing import Final

_HAS_FLAGS_MULTI_CONN: Final = 1 << 0 | 1 << 8
_READ_ONLY: Final = 1 << 1
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")

_GO: Final = 7
_ACK, _INFO, _ERR_UNSUP = 1, 3, (1 << 31) + 1
_READ, _WRITE = 0, 1


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes."""
    data = sock.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise ConnectionError
    return data


def negotiate(sock: socket.socket, size: int, flags: int) -> None:
    """Refuse every option but GO."""
    sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    receive(sock, 4)
    while True:
        _, option, length = _OPTION.unpack(receive(sock, _OPTION.size))
        if length:
            receive(sock, length)
        if option == _GO:
            break
        sock.sendall(_OPTION_REPLY.pack(0x3E889045565A9, option, _ERR_UNSUP, 0))
    info = struct.pack(">HQH", 0, size, flags)
    sock.sendall(_OPTION_REPLY.pack(0x3E889045565A9, option, _INFO, len(info)) + info)
    sock.sendall(_OPTION_REPLY.pack(0x3E889045565A9, option, _ACK, 0))


def serve(sock: socket.socket, file: int, size: int, flags: int, *, copying: bool) -> None:
    """One connection."""
    buffer = memoryview(b"")
    try:
        negotiate(sock, size, flags)
        while True:
            _, _, command, cookie, offset, length = _REQUEST.unpack(receive(sock, _REQUEST.size))
            reply = _REPLY.pack(0x67446698, 0, cookie)
            if command == _WRITE and not flags & _READ_ONLY:
                os.pwrite(file, receive(sock, length), offset)
                sock.sendall(reply)
                continue
            if command != _READ:
                return
            if copying:
                if len(buffer) < _REPLY.size + length:
                    buffer = memoryview(bytearray(_REPLY.size + length))
                message = buffer[: _REPLY.size + length]
                message[: _REPLY.size] = reply
                os.preadv(file, [message[_REPLY.size :]], offset)
                sock.sendall(message)
                continue
            sock.send(reply, socket.MSG_MORE)
            end = offset + length
            while offset < end:
                offset += os.sendfile(sock.fileno(), file, offset, end - offset)
    except ConnectionError:
        return
    finally:
        sock.close()


def main() -> None:
    """Serve until a signal ends the process."""
    address, path, *more = sys.argv[1:]
    is_writable, copying = "writable" in more, "copying" in more
    file = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
    flags = _HAS_FLAGS_MULTI_CONN | (0 if is_writable else _READ_ONLY)
    size = os.fstat(file).st_size
    is_port = address.isdigit()
    listener = socket.socket(socket.AF_INET if is_port else socket.AF_UNIX)
    listener.bind(("127.0.0.1", int(address)) if is_port else address)
    listener.listen()
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        if is_port:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serving = partial(serve, sock, file, size, flags, copying=copying)
        threading.Thread(target=serving, daemon=True).start()


if __name__ == "__main__":
    main()
