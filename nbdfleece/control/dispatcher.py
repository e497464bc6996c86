"""From a request to its result: the one place where errors become QMP's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ..errors import NbdfleeceError
from .controlled import Controlled
from .errors import QmpError, describe_os_error

_log = logging.getLogger("nbdfleece.control")


class Dispatcher:
    """Carries commands out.

    Args:
        server: Has the commands, and is what they work on.
    """

    def __init__(self, server: Controlled) -> None:
        self._server = server
        self._running = 0
        self._is_stopping = False
        self._idle = asyncio.Event()

    async def execute(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Carry a command out.

        Raises:
            QmpError: Whatever went wrong.
        """
        if self._is_stopping:
            raise QmpError("the server is shutting down")
        command = self._server.commands.build(name, arguments)
        self._running += 1
        try:
            result = await command.run(self._server)
        except QmpError:
            raise
        except NbdfleeceError as error:
            raise QmpError(str(error)) from error
        except OSError as error:
            raise QmpError(describe_os_error(error)) from error
        except Exception as error:
            _log.exception("command '%s' failed", name)
            raise QmpError(f"internal error: {type(error).__name__}: {error}") from error
        finally:
            self._running -= 1
            self._idle.set()
        return {} if result is None else result

    async def finish(self) -> None:
        """Refuse further commands, and wait for those that are being carried out."""
        self._is_stopping = True
        while self._running:
            self._idle.clear()
            await self._idle.wait()
