"""The flags of qemu-nbd: one table for ``nbdfleece nbd`` and for ``nbdfleece-qemu-nbd``.

What each does here is told to users by docs/qemu-nbd.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from ..errors import UsageError


class Flag(NamedTuple):
    """A flag; one without ``metavar`` is a switch."""

    name: str
    short: str
    metavar: str
    help: str

    def label(self) -> str:
        """How ``--help`` shows it."""
        value = f"={self.metavar}" if self.metavar else ""
        short = f"-{self.short}, " if self.short else "    "
        return f"{short}--{self.name}{value}"


SECTIONS: Final[dict[str, tuple[Flag, ...]]] = {
    "": (
        Flag("help", "h", "", "show this and exit"),
        Flag("version", "V", "", "show the version and exit"),
    ),
    "Connections": (
        Flag("port", "p", "PORT", "TCP port to listen on (default 10809)"),
        Flag("bind", "b", "IFACE", "address to listen on (default 0.0.0.0)"),
        Flag("socket", "k", "PATH", "listen on a Unix socket instead"),
        Flag("shared", "e", "NUM", "clients at a time, 0 for any number (default 1)"),
        Flag("persistent", "t", "", "do not exit when the last client has left"),
        Flag("verbose", "v", "", "log what happens; twice for more"),
        Flag("export-name", "x", "NAME", "name of the export (default: empty)"),
        Flag("description", "D", "TEXT", "description of the export"),
        Flag("handshake-limit", "", "N", "seconds a handshake may take, 0 for any (default 10)"),
    ),
    "Exposing part of the image": (
        Flag("offset", "o", "OFFSET", "where in the disk the export begins, in bytes"),
        Flag("allocation-depth", "A", "", "offer qemu:allocation-depth"),
        Flag("bitmap", "B", "NAME", "offer qemu:dirty-bitmap:NAME; may be repeated"),
    ),
    "General": (
        Flag("list", "L", "", "list the exports of another server, as its client"),
        Flag("object", "", "TYPE,id=ID,...", "define TLS credentials or authorization"),
        Flag("tls-creds", "", "ID", "demand TLS with the credentials of an --object"),
        Flag("tls-authz", "", "ID", "let in only whom an --object allows"),
        Flag("tls-hostname", "", "HOSTNAME", "with --list: whose certificate to expect"),
        Flag("trace", "T", "PATTERN", "ignored: QEMU's tracing is not here"),
        Flag("fork", "", "", "go on in the background once clients can come"),
        Flag("pid-file", "", "PATH", "write the process id there"),
        Flag("selinux-label", "", "LABEL", "SELinux context of the Unix socket"),
    ),
    "Kernel devices": (
        Flag("connect", "c", "DEV", "refused: use nbd-client on a socket"),
        Flag("disconnect", "d", "", "refused: use nbd-client -d"),
    ),
    "The image": (
        Flag("format", "f", "FORMAT", "raw or qcow2 (default: a guess)"),
        Flag("read-only", "r", "", "export read-only"),
        Flag("snapshot", "s", "", "writes go to a temporary file and are lost at the end"),
        Flag(
            "load-snapshot",
            "l",
            "SNAPSHOT",
            "export an internal snapshot, read-only: ID_OR_NAME, or"
            " snapshot.id=ID,snapshot.name=NAME",
        ),
        Flag("nocache", "n", "", "ignored: the page cache is used"),
        Flag("cache", "", "MODE", "none, writeback (default), writethrough, directsync, unsafe"),
        Flag("aio", "", "MODE", "threads; native and io_uring are ignored"),
        Flag("discard", "", "MODE", "ignore (default) or unmap"),
        Flag("detect-zeroes", "", "MODE", "off (default), on or unmap"),
        Flag("image-opts", "", "", "FILE is a list of node options: driver=...,file.filename=..."),
    ),
}
"""All flags that QEMU 7.2 and 10.0 have, in the order of ``--help``."""

FLAGS: Final = tuple(flag for flags in SECTIONS.values() for flag in flags)


class Given(NamedTuple):
    """A command line taken apart.

    Attributes:
        flags: Names and values in their order; the value of a switch is "".
        names: What is no flag.
    """

    flags: Sequence[tuple[str, str]]
    names: Sequence[str]

    def has(self, *names: str) -> bool:
        """Whether one of these flags was given."""
        return any(name in names for name, _ in self.flags)

    def all(self, name: str) -> list[str]:
        """All values of a flag."""
        return [value for given, value in self.flags if given == name]

    def last(self, name: str) -> str | None:
        """The value of a flag, the last one if there are more."""
        values = self.all(name)
        return values[-1] if values else None

    def once(self, *names: str) -> None:
        """Insist that of these flags one at most was given.

        Raises:
            UsageError: They were more.
        """
        if sum(len(self.all(name)) for name in names) > 1:
            raise UsageError(f"{' and '.join('--' + name for name in names)}: only once")

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """The value of a flag; the first of ``choices`` if it was not given.

        Raises:
            UsageError: It is none of ``choices``.
        """
        value = self.last(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise UsageError(f"--{name} is to be one of {', '.join(choices)}, not '{value}'")
        return value

    def number(self, name: str, most: int) -> int | None:
        """The value of a flag as a number, decimal or with 0x; None if it was not given.

        Raises:
            UsageError: It is none from 0 to ``most``.
        """
        text = self.last(name)
        if text is None:
            return None
        try:
            number = int(text, 0)
        except ValueError:
            number = -1
        if not 0 <= number <= most:
            raise UsageError(f"--{name} is to be a number from 0 to {most}, not '{text}'")
        return number


def help_lines() -> Iterator[str]:
    """The flags for ``--help``."""
    for section, flags in SECTIONS.items():
        if section:
            yield f"\n{section}:"
        for flag in flags:
            label = flag.label()
            if len(label) > 24:
                yield f"  {label}"
                label = ""
            yield f"  {label:24}  {flag.help}"
