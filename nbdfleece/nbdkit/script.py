"""A script: loading it, calling its callbacks, and what becomes of its errors.

Whatever a callback raises is logged as ``SCRIPT: CALLBACK: error: TRACEBACK``, and becomes a
:class:`CallbackError`. So does a value that nbdkit does not take.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Container
from types import ModuleType, TracebackType
from typing import Any, Final, TypeVar

from .calls import current
from .coroutines import CoroutineThread
from .errors import CallbackError, ScriptError
from .module import log

T = TypeVar("T")

API_VERSION_MAX: Final = 2
REQUIRED: Final = ("open", "get_size", "pread")


class Script:
    """A script that was loaded.

    Args:
        path: Its file, as the user gave it.
        module: What it has defined.

    Attributes:
        api_version: 1 or 2: how the data callbacks are called.
        coroutines: Where its ``async def`` callbacks run.

    Raises:
        ScriptError: A callback is missing that it must have, or its API version is unknown.
    """

    def __init__(self, path: str, module: ModuleType) -> None:
        self.path = path
        self.coroutines = CoroutineThread()
        self._module = module
        if not all(self.has(name) for name in REQUIRED):
            raise ScriptError(
                f"{path}: one of the required callbacks 'open', 'get_size' or 'pread' is not "
                "defined by this Python script"
            )
        self.api_version = self._find_api_version()

    @classmethod
    def load(cls, path: str) -> Script:
        """Run a script's file as ``__main__``, as nbdkit does.

        Raises:
            ScriptError: It cannot be read, it fails, or it is no plugin.
        """
        try:
            with open(path, "rb") as stream:
                text = stream.read()
        except OSError as error:
            raise ScriptError(f"{path}: cannot open file: {error.strerror}") from error
        module = ModuleType("__main__")
        module.__file__ = path
        sys.modules["__main__"] = module
        try:
            exec(compile(text, path, "exec"), vars(module))
        except Exception as error:
            log.error("%s: error: %s", path, format_error(error))
            raise ScriptError(
                f"{path}: error running this script: {_in_one_line(error)}"
            ) from error
        return cls(path, module)

    def _find_api_version(self) -> int:
        version = getattr(self._module, "API_VERSION", 1)
        if not isinstance(version, int) or not 1 <= version <= API_VERSION_MAX:
            raise ScriptError(
                f"{self.path}: API_VERSION requested unknown version: {version}.  This server "
                f"supports API versions between 1 and {API_VERSION_MAX}."
            )
        return version

    def has(self, name: str) -> bool:
        """Whether the script defines a callback."""
        return callable(getattr(self._module, name, None))

    def call(self, name: str, *args: Any, unlogged: Container[int] = ()) -> Any:
        """Call a callback, which must be defined; waits for one that is ``async def``.

        Args:
            name: The callback.
            *args: Its arguments.
            unlogged: With these values of ``set_error`` a failure is an answer like others.

        Raises:
            CallbackError: It has failed.
        """
        try:
            result = getattr(self._module, name)(*args)
            return self.coroutines.wait(result) if inspect.iscoroutine(result) else result
        except BaseException as error:
            is_main = threading.current_thread() is threading.main_thread()
            if isinstance(error, KeyboardInterrupt) and is_main:
                raise
            call = current.get()
            if call is not None and call.error in unlogged:
                raise CallbackError(name, call.error, _in_one_line(error)) from None
            raise self.failure(name, format_error(error), _in_one_line(error)) from None

    def ask(self, name: str, convert: Callable[[Any], T], *args: Any) -> T:
        """Call a callback and convert what it returns.

        Args:
            name: The callback.
            convert: Raises ``ValueError`` or ``TypeError`` for what it does not take.
            *args: The callback's arguments.

        Raises:
            CallbackError: It has failed, or has returned what it must not.
        """
        result = self.call(name, *args)
        try:
            return convert(result)
        except (ValueError, TypeError) as error:
            failure = self.failure(name, str(error))
            failure.number = failure.number or getattr(error, "errno", 0)
            raise failure from None

    def failure(self, name: str, text: str, in_one_line: str | None = None) -> CallbackError:
        """Log that a callback has failed; the error is to be raised."""
        log.error("%s: %s: error: %s", self.path, name, text)
        call = current.get()
        return CallbackError(name, call.error if call is not None else 0, in_one_line or text)


def format_error(error: BaseException) -> str:
    """An exception with the traceback of what is the script's own."""
    lines = traceback.format_exception(type(error), error, _below_us(error.__traceback__))
    return "".join(lines).rstrip("\n")


def _below_us(found: TracebackType | None) -> TracebackType | None:
    """The traceback without this module's frames at its top."""
    while found is not None and found.tb_frame.f_code.co_filename == __file__:
        found = found.tb_next
    return found


def _in_one_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()
