"""NBD servers for tests, with faults: ``pytest_plugins = ["nbdfleece.testing"]`` in a conftest.

The server is the real one, in a thread of its own, on a Unix socket in a temporary folder. What
goes wrong with it is said by faults, before or while clients are connected.
"""

from ..nbd.constants import Command
from .faults import BadMagic, Cut, Delay, Drop, Fail, Fault, Lie, Lying, WrongCookie
from .faulty_server import Seen
from .fixtures import nbd_server
from .live_server import LiveServer
from .memory_node import MemoryNode

__all__ = [
    "BadMagic",
    "Command",
    "Cut",
    "Delay",
    "Drop",
    "Fail",
    "Fault",
    "Lie",
    "LiveServer",
    "Lying",
    "MemoryNode",
    "Seen",
    "WrongCookie",
    "nbd_server",
]
