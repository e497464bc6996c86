"""nbd-server: one configuration file per configuration; it always goes to the background."""

from __future__ import annotations

from conformance import case
from conformance.case import Export
from conformance.servers.base import Adapter, Plan, Unsupported, first_line, free_port
from conformance.stream import Endpoint


class NbdServer(Adapter):
    """Raw images; TLS forced, selective, and per export."""

    name = "nbd-server"

    def version(self) -> str:
        return first_line(*self.place.programs.argv("nbd-server", "-V"))

    def plan(self, configuration: str) -> Plan:
        if configuration in (case.BAD_SECTOR, case.BAD_STATUS, case.BLOCK_SIZES):
            raise Unsupported("nbd-server has no such backend")
        exports = self._exports(configuration)
        endpoint, listen = self._address(configuration)
        tls = {case.TLS_FORCED: "forced", case.TLS_SELECTIVE: "selective"}.get(configuration, "off")
        lines = ["[generic]", *listen, "allowlist = true", *self._tls(tls)]
        for export in exports:
            lines += self._section(export)
        config, pid_file = self.place.path(".conf"), self.place.path(".pid")
        config.write_text("\n".join(lines) + "\n")
        argv = self.place.programs.argv("nbd-server", "-C", str(config), "-p", str(pid_file))
        return Plan(argv, endpoint, exports, tls=tls, pid_file=pid_file)

    def _exports(self, configuration: str) -> tuple[Export, ...]:
        if configuration == case.MANY:
            return tuple(map(self.known_export, ("ex", "other", "third")))
        if configuration == case.TLS_SELECTIVE:
            return self.known_export(), self.known_export("secret", tls_only=True)
        return (self.known_export(writable=configuration == case.WRITABLE),)

    def _address(self, configuration: str) -> tuple[Endpoint, list[str]]:
        port = free_port()
        listen = ["listenaddr = 127.0.0.1", f"port = {port}"]
        if configuration == case.TCP:
            return Endpoint(host="127.0.0.1", port=port), listen
        path = str(self.place.path(".sock"))
        return Endpoint(path=path), [*listen, f"unixsock = {path}"]

    def _tls(self, mode: str) -> list[str]:
        if mode == "off":
            return []
        folder = self.place.certificates
        return [
            f"certfile = {folder}/server-cert.pem",
            f"keyfile = {folder}/server-key.pem",
            f"cacertfile = {folder}/ca-cert.pem",
            f"force_tls = {'true' if mode == 'forced' else 'false'}",
        ]

    def _section(self, export: Export) -> list[str]:
        path = self.place.images.raw
        if export.writable:
            path = self.place.images.copy("raw", self.place.path(".raw").name)
        lines = [f"[{export.name}]", f"exportname = {path}", "flush = true", "fua = true"]
        lines += ["trim = true"] if export.writable else ["readonly = true"]
        return lines + ["force_tls = true"] * export.tls_only
