"""Configuring a script, in nbdkit's order: load, config, config_complete, thread_model,
get_ready; then, having gone to the background or not, after_fork; cleanup at the very end.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .. import __version__
from ..errors import UsageError
from .errors import CallbackError, ScriptError
from .module import PARALLEL, SERIALIZE_ALL_REQUESTS, THREAD_MODELS, Server, install, make_module
from .script import API_VERSION_MAX, Script

Parameters = Sequence[tuple[str, str]]

_KEY: Final = re.compile("[A-Za-z][A-Za-z0-9._-]*")
_PEP_384_VERSION: Final = 3
"""PYTHON_ABI_VERSION of CPython 3."""


@dataclass(slots=True, kw_only=True)
class Plugin:
    """A script that is ready to be served.

    Attributes:
        script: The script.
        server: What its calls of the module ``nbdkit`` reach.
        thread_model: How many of its callbacks may run at a time.
    """

    script: Script
    server: Server
    thread_model: int


def parse_words(words: Sequence[str]) -> tuple[str, Parameters]:
    """Take the command line apart: the script, and its parameters.

    Raises:
        UsageError: A word is not ``KEY=VALUE``.
    """
    path, *rest = words
    parameters = []
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(f"expecting key=value on the command line but got: {word}")
        parameters.append((key, value))
    return path.removeprefix("script="), parameters


def load(path: str, parameters: Parameters, server: Server) -> Script:
    """Load a script and give it its parameters.

    Raises:
        ScriptError: It is no plugin, or does not take a parameter.
    """
    install(make_module(server))
    script = Script.load(path)
    for key, value in parameters:
        if not script.has("config"):
            raise ScriptError(f"{path}: this plugin does not need command line configuration")
        _run(script, "config", key, value)
    return script


def prepare(script: Script, server: Server) -> Plugin:
    """Do what is done once all parameters are known, before going to the background.

    Raises:
        ScriptError: A callback has failed.
    """
    _run(script, "config_complete")
    plugin = Plugin(script=script, server=server, thread_model=thread_model(script))
    _run(script, "get_ready")
    script.coroutines.pause()
    return plugin


def after_fork(plugin: Plugin) -> None:
    """Do what is done in the process that serves.

    Raises:
        ScriptError: The callback has failed.
    """
    _run(plugin.script, "after_fork")
    plugin.server.is_configured = True


def thread_model(script: Script) -> int:
    """The thread model that a script asks for.

    Raises:
        ScriptError: It is none.
    """
    if not script.has("thread_model"):
        return SERIALIZE_ALL_REQUESTS
    try:
        return script.ask("thread_model", _check_thread_model)
    except CallbackError as error:
        raise ScriptError(f"{script.path}: {error}") from error


def dump_plugin(script: Script) -> Iterator[str]:
    """What ``--dump-plugin`` prints before the script's own lines."""
    yield f"path={script.path}"
    yield "name=python"
    yield f"version={__version__}"
    yield f"api_version={API_VERSION_MAX}"
    yield f"max_thread_model={THREAD_MODELS[PARALLEL]}"
    yield f"thread_model={THREAD_MODELS[thread_model(script)]}"
    yield f"python_version={platform.python_version()}"
    yield f"python_pep_384_abi_version={_PEP_384_VERSION}"
    yield f"nbdkit_python_maximum_api_version={API_VERSION_MAX}"


def print_plugin(script: Script) -> None:
    """Print what a script is.

    Raises:
        ScriptError: A callback has failed.
    """
    print("\n".join(dump_plugin(script)))
    _run(script, "dump_plugin")
    sys.stdout.flush()


def _run(script: Script, name: str, *args: str) -> None:
    if script.has(name):
        try:
            script.call(name, *args)
        except CallbackError as error:
            raise ScriptError(f"{script.path}: {error}") from error


def _check_thread_model(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= PARALLEL:
        raise ValueError(f"{value!r} is none of nbdkit.THREAD_MODEL_*")
    return int(value)
