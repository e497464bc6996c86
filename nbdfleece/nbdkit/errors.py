"""What becomes of a script that fails."""

from __future__ import annotations

from ..errors import NbdfleeceError


class ScriptError(NbdfleeceError):
    """The script cannot be served; said in one line, details are in the log."""


class CallbackError(NbdfleeceError):
    """A callback has failed, and the log says why.

    Args:
        callback: Its name.
        number: The errno of ``set_error``; 0 if the script has set none.
        text: What happened, in one line.
    """

    def __init__(self, callback: str, number: int, text: str) -> None:
        super().__init__(f"{callback}: {text}")
        self.callback = callback
        self.number = number
