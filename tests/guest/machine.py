"""A virtual machine under QEMU's own emulation, which needs neither root nor KVM."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from pathlib import Path

SECONDS_MAX = 400.0
"""For anything that a guest is waited for; the whole boot takes three."""


class Machine:
    """A guest that runs until it powers itself off or is killed.

    Args:
        kernel: What to boot.
        initramfs: The archive to boot from.
        parameters: For the kernel's command line; init gets them as its environment.
        options: QEMU's, for what the machine has beyond a serial console.
    """

    def __init__(
        self, kernel: Path, initramfs: Path, parameters: dict[str, str], *options: str
    ) -> None:
        words = ["console=ttyS0", "quiet", "panic=-1"]
        words += [f"{name}={value}" for name, value in parameters.items()]
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot"),
                *("-display", "none", "-serial", "stdio"),
                *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", " ".join(words)),
                *options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._has_ended = False
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        """Keep what the console says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    @property
    def console(self) -> str:
        """All that was said, QEMU's own complaints included."""
        with self._changed:
            return "\n".join(self._lines)

    def said(self, pattern: str) -> list[str]:
        """What followed ``guest: PATTERN`` in each line that has it."""
        return re.findall(rf"^guest: {pattern}(.*)$", self.console, re.MULTILINE)

    def wait_for(self, pattern: str) -> str:
        """What the guest says after ``guest: PATTERN``, as soon as it does."""
        deadline = time.monotonic() + SECONDS_MAX
        with self._changed:
            while not (found := self.said(pattern)):
                left = deadline - time.monotonic()
                is_over = self._has_ended or left <= 0
                assert not is_over, f"the guest never said '{pattern}':\n{self.console}"
                self._changed.wait(left)
        return found[0]

    def send(self, line: str) -> None:
        """Type a line on the console."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_end(self) -> None:
        """Wait until the guest has powered itself off."""
        assert self._process.wait(SECONDS_MAX) == 0, self.console

    def kill(self) -> None:
        """End it in any case, as a power cut does."""
        self._process.kill()
        self._process.wait(SECONDS_MAX)
        self._listener.join(SECONDS_MAX)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
