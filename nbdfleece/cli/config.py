"""``nbdfleece serve --config FILE``: the options of a server in one TOML file.

What the file says are the defaults of the options of the command line, which come before it.
File names in it are relative to its own folder. Whatever is wrong is told with the line.

    control = "/run/nbdfleece/control.sock"
    listen = ["unix:/run/nbdfleece/nbd.sock", "tcp:127.0.0.1:10809"]

    [disks]
    vda = "/images/vda.qcow2"

    [disks.vdb]
    file = "/images/vdb.qcow2"
    detect-zeroes = "unmap"

    [read-only]
    template = "/images/template.qcow2"

    [scratch]
    directory = "/var/tmp"
    quota = "10G"

    [limits]
    handshake-seconds = 10

    [exports."*/vda"]
    connections-max = 4
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import click
import msgspec

from ..errors import UsageError
from .addresses import NO_CONTROL, parse_listen
from .export_options import parse_export_rule
from .limit_options import parse_limits
from .read_only_options import NICE_MAX, PROCESSES_MAX, parse_bitmaps, parse_images, parse_since
from .sizes import parse_size

Scalar = bool | int | float | str
_Said = TypeVar("_Said")

_AT_PATH: Final = re.compile(r"(?P<text>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.*)`")


class _Part(msgspec.Struct, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A table of the file; what is not there is None."""


class DiskConfig(_Part):
    """A disk of which more is said than its file."""

    file: str
    discard: Literal["unmap", "ignore"] | None = None
    detect_zeroes: Literal["off", "on", "unmap"] | None = None


class ImageConfig(_Part):
    """A read-only image of which more is said than its file."""

    file: str
    bitmaps: list[str] = []
    since: list[str] = []


class ScratchConfig(_Part):
    """``[scratch]``: how snapshots are kept."""

    directory: str | None = None
    quota: int | str | None = None
    granularity: int | str | None = None
    on_cbw_error: Literal["break-snapshot", "break-guest-write"] | None = None
    cbw_timeout: float | None = None


class TlsConfig(_Part):
    """``[tls]``: how to do TLS, and who may have what; ``authorize`` is pairs as of the option."""

    mode: Literal["off", "on", "require"] | None = None
    certificates: str | None = None
    psk: str | None = None
    verify_peer: bool | None = None
    authorize: list[tuple[str, str]] = []


class ServerConfig(_Part):
    """The whole file."""

    disks: dict[str, str | DiskConfig] = {}
    read_only: dict[str, str | ImageConfig] = {}
    processes: Annotated[int, msgspec.Meta(ge=0, le=PROCESSES_MAX)] | None = None
    processes_nice: Annotated[int, msgspec.Meta(ge=-NICE_MAX, le=NICE_MAX)] | None = None
    backups: list[str] = []
    listen: list[str] = []
    control: str | None = None
    socket_mode: str | None = None
    socket_owner: str | None = None
    scratch: ScratchConfig = msgspec.field(default_factory=ScratchConfig)
    tls: TlsConfig = msgspec.field(default_factory=TlsConfig)
    limits: dict[str, int | float | str] = {}
    exports: dict[str, dict[str, Scalar]] = {}


def load_config(path: Path) -> dict[str, Any]:
    """Read a file.

    Returns:
        Defaults of the options of ``serve``, by their names.

    Raises:
        UsageError: It cannot be read, or says what cannot be meant; with the line.
    """
    try:
        text = path.read_bytes().decode()
        config = msgspec.convert(tomllib.loads(text), ServerConfig)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        what, keys = _read_error(str(error))
        raise UsageError(f"{path}:{line_of(text, keys)}: {what}") from None
    return _Checked(path, text).options(config)


def _read_error(text: str) -> tuple[str, list[str]]:
    """What is wrong, and the keys that lead there."""
    match = _AT_PATH.fullmatch(text)
    assert match is not None, "everything fits"
    keys = [key for key in re.split(r"[.\[\]]", match["path"] or "") if key and key != "..."]
    unknown = _UNKNOWN.fullmatch(match["text"])
    if unknown is not None:
        return f"there is no '{unknown['name']}' here", [*keys, unknown["name"]]
    where = f"{'.'.join(keys)}: " if keys else ""
    return where + match["text"], keys


def line_of(text: str, keys: Sequence[str]) -> int:
    """The line on which a key is, or else the closest thing around it; the first is 1."""
    best, depth, table = 1, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*\[+([^]]*)\]+\s*(?:#.*)?", line)
        if header is not None:
            table, key = header[1], header[1]
        else:
            key = f"{table}.{line.partition('=')[0]}" if table else line.partition("=")[0]
        found = [part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", key)]
        common = len(found) if list(keys[: len(found)]) == found else 0
        if common > depth:
            best, depth = number, common
    return best


class _Checked:
    """Turns a file's values into options, each checked where it stands."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text

    def options(self, config: ServerConfig) -> dict[str, Any]:
        """Defaults of the options of ``serve``; what the file does not say is not there."""
        scratch, tls = config.scratch, config.tls
        for index, address in enumerate(config.listen):
            self._check(["listen", str(index)], parse_listen, address)
        found: dict[str, Any] = {
            **self._disks(config.disks),
            **self._images(config.read_only, config.disks),
            "processes": config.processes,
            "processes_nice": config.processes_nice,
            "backups": [self._file(backup) for backup in config.backups],
            "listen": config.listen,
            "control": config.control
            if config.control in (None, NO_CONTROL)
            else self._file(str(config.control)),
            "socket_mode": config.socket_mode,
            "socket_owner": config.socket_owner,
            "scratch_dir": self._file(scratch.directory),
            "scratch_quota": self._size("quota", scratch.quota),
            "scratch_granularity": self._size("granularity", scratch.granularity),
            "on_cbw_error": scratch.on_cbw_error,
            "cbw_timeout": scratch.cbw_timeout,
            "tls": tls.mode,
            "tls_certificates": self._file(tls.certificates),
            "tls_psk": self._file(tls.psk),
            "tls_verify_peer": tls.verify_peer,
            "authorize": tls.authorize,
            "limits": [self._limit(name, value) for name, value in config.limits.items()],
            "export_rules": [
                self._rule(pattern, key, value)
                for pattern, values in config.exports.items()
                for key, value in values.items()
            ],
        }
        return {name: value for name, value in found.items() if value not in (None, [])}

    def _disks(self, disks: dict[str, str | DiskConfig]) -> dict[str, list[str]]:
        each = {
            name: disk if isinstance(disk, DiskConfig) else DiskConfig(file=disk)
            for name, disk in disks.items()
        }
        return {
            "disks": [f"{name}={self._file(disk.file)}" for name, disk in each.items()],
            "discard": [f"{name}={disk.discard}" for name, disk in each.items() if disk.discard],
            "detect_zeroes": [
                f"{name}={disk.detect_zeroes}" for name, disk in each.items() if disk.detect_zeroes
            ],
        }

    def _images(
        self, images: dict[str, str | ImageConfig], disks: Container[str]
    ) -> dict[str, list[str]]:
        each = {
            name: image if isinstance(image, ImageConfig) else ImageConfig(file=image)
            for name, image in images.items()
        }
        shown = [self._shown(name, image) for name, image in each.items()]
        return {
            "images": [
                self._check(
                    ["read-only", name],
                    lambda word: parse_images([word], disks),
                    f"{name}={self._file(image.file)}",
                )
                for name, image in each.items()
            ],
            "bitmaps": [word for bitmaps, _ in shown for word in bitmaps],
            "since": [word for _, since in shown for word in since],
        }

    def _shown(self, name: str, image: ImageConfig) -> tuple[list[str], list[str]]:
        """What is shown with an image, as words of ``--bitmap`` and of ``--since``."""
        keys = ["read-only", name]
        bitmaps = [f"{name}={each}" for each in image.bitmaps]
        since = [f"{name}={each}" for each in image.since]
        self._check([*keys, "bitmaps"], lambda words: parse_bitmaps(words, [name]), bitmaps)
        self._check(
            [*keys, "since"], lambda words: parse_since(words, {name: image.bitmaps}), since
        )
        return bitmaps, since

    def _file(self, name: str | None) -> str | None:
        return None if name is None else str(self._path.parent / name)

    def _size(self, key: str, value: int | str | None) -> str | None:
        if value is None:
            return None
        return self._check(["scratch", key], parse_size, str(value))

    def _limit(self, name: str, value: float | str) -> str:
        return self._check(["limits", name], lambda word: parse_limits([word]), f"{name}={value}")

    def _rule(self, pattern: str, key: str, value: Scalar) -> str:
        word = ("off", "on")[value] if isinstance(value, bool) else value
        return self._check(["exports", pattern, key], parse_export_rule, f"{pattern}:{key}={word}")

    def _check(self, keys: Sequence[str], parse: Callable[[_Said], object], said: _Said) -> _Said:
        """A word, or words, that an option takes.

        Raises:
            UsageError: It does not.
        """
        try:
            parse(said)
        except (UsageError, click.UsageError) as error:
            line = line_of(self._text, keys)
            raise UsageError(f"{self._path}:{line}: {error}") from None
        return said


def _use_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **load_config(path)}


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_use_config,
    help="Take what is not said here from a TOML file; docs/config.md describes it.",
)
