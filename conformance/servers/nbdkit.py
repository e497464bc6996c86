"""nbdkit: the file plugin under the exportname filter, other filters where a case needs them."""

from __future__ import annotations

from dataclasses import replace

from conformance import case, content
from conformance.servers.base import Adapter, Plan, Unsupported, first_line, free_port
from conformance.stream import Endpoint

_NAMED = (
    "--filter=exportname",
    "exportname=ex",
    "default-export=ex",
    "exportname-strict=true",
    "exportname-list=explicit",
    "exportdesc=fixed:the disk of the suite",
)


class Nbdkit(Adapter):
    """Raw images only; TLS forced or selective."""

    name = "nbdkit"

    def version(self) -> str:
        return first_line(*self.place.programs.argv("nbdkit", "--version"))

    def plan(self, configuration: str) -> Plan:
        if configuration == case.MANY:
            raise Unsupported("the file plugin's exports are files without names of their own")
        raw = self.place.images.raw
        if configuration == case.WRITABLE:
            raw = self.place.images.copy("raw", self.place.path(".raw").name)
            return self._plan(["file", str(raw), *_NAMED], writable=True)
        if configuration == case.BLOCK_SIZES:
            return self._block_sizes()
        if configuration == case.BAD_SECTOR:
            words = ["--filter=ddrescue", *_NAMED[:1], "file", str(raw), *_NAMED[1:]]
            return self._plan(["-r", *words, f"ddrescue-mapfile={self._map_file()}"])
        if configuration == case.BAD_STATUS:
            return self._plan(["-r", *_NAMED[:1], "eval", *self._bad_status(), *_NAMED[1:]])
        return self._plan(["-r", *_NAMED[:1], "file", str(raw), *_NAMED[1:]], configuration)

    def _plan(
        self, words: list[str], configuration: str = case.READ_ONLY, *, writable: bool = False
    ) -> Plan:
        tls = {case.TLS_FORCED: "forced", case.TLS_SELECTIVE: "selective"}.get(configuration, "off")
        option = {"forced": "require", "selective": "on", "off": "off"}[tls]
        endpoint, listen = self._address(configuration)
        head = ["-f", *listen, f"--tls={option}"]
        if tls != "off":
            head.append(f"--tls-certificates={self.place.certificates}")
        export = self.known_export(description="the disk of the suite", writable=writable)
        if "eval" in words:
            export = replace(export, content=None)
        argv = self.place.programs.argv("nbdkit", *head, *words)
        return Plan(argv, endpoint, (export,), tls=tls)

    def _address(self, configuration: str) -> tuple[Endpoint, list[str]]:
        if configuration == case.TCP:
            port = free_port()
            return Endpoint(host="127.0.0.1", port=port), ["-i", "127.0.0.1", "-p", str(port)]
        path = str(self.place.path(".sock"))
        return Endpoint(path=path), ["-U", path]

    def _map_file(self) -> str:
        size, bad = self.place.images.content.size, content.BAD_SECTOR
        lines = [
            "# Mapfile. Created by GNU ddrescue version 1.21",
            "0x0     ?",
            f"0x0 {bad:#x} +",
            f"{bad:#x} 0x200 -",
            f"{bad + 512:#x} {size - bad - 512:#x} +",
        ]
        path = self.place.path(".map")
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def _bad_status(self) -> list[str]:
        size = self.place.images.content.size
        return [
            f"get_size=echo {size}",
            "pread=head -c $3 /dev/zero",
            "can_extents=exit 0",
            "extents=echo EIO no map of this disk >&2; exit 1",
        ]

    def _block_sizes(self) -> Plan:
        raw = self.place.images.raw.with_name(self.place.path(".raw").name)
        with raw.open("wb") as file:
            file.truncate(content.SMALL_DISK_BYTES)
        policy = [
            "blocksize-minimum=4096",
            "blocksize-preferred=65536",
            "blocksize-maximum=33554432",
            "blocksize-error-policy=error",
        ]
        path = str(self.place.path(".sock"))
        words = ["-f", "-U", path, "--filter=blocksize-policy", "file", str(raw), *policy]
        argv = self.place.programs.argv("nbdkit", *words)
        export = case.Export("", size=content.SMALL_DISK_BYTES, writable=True)
        return Plan(argv, Endpoint(path=path), (export,), strict_names=False)
