"""A script that notes each call of it, and behaves as its parameters say.

log=FILE            where calls are noted
define=NAME,...     callbacks to have beside open, get_size and pread
return=NAME:VALUE   what a callback returns instead
fail=NAME[:ERRNO]   a callback raises, having set an errno
soft=NAME:ERRNO     a callback sets an errno and returns
errnos=N,...        pread fails at offset 512 * i with the i-th errno
extents=LIST        extents returns the i-th of these at offset 4096 + i
refuse=1            the callback that the export is named after raises
"""

import ast
import builtins

import nbdkit

API_VERSION = 2  # VERSION

disk = bytearray(1 << 20)
values = {}
failing = {}
soft = {}
errnos = []
extents_of = []
refuses = False
log_path = None
early = []


class Boom(Exception):
    pass


def shown(value):
    if isinstance(value, memoryview):
        return f"{'ro' if value.readonly else 'rw'}[{len(value)}]"
    return "handle" if value is disk else repr(value)


def note(name, args):
    line = f"{name}({', '.join(map(shown, args))})"
    if log_path is None:
        early.append(line)
        return
    with builtins.open(log_path, "a") as stream:
        stream.write("".join(text + "\n" for text in [*early, line]))
    early.clear()


def config(key, value):
    global log_path, refuses
    if key == "log":
        log_path = value
    elif key == "define":
        for name in value.split(","):
            globals()[name] = callback(name)
    elif key == "return":
        name, _, text = value.partition(":")
        values[name] = ast.literal_eval(text)
    elif key == "fail":
        name, _, number = value.partition(":")
        failing[name] = int(number or 0)
    elif key == "soft":
        name, _, number = value.partition(":")
        soft[name] = int(number)
    elif key == "errnos":
        errnos.extend(map(int, value.split(",")))
    elif key == "extents":
        extents_of.extend(ast.literal_eval(value))
    elif key == "refuse":
        refuses = True
    note("config", (key, value) if key != "log" else (key,))
    react("config", None)


def react(name, result):
    if name in soft:
        nbdkit.set_error(soft[name])
    if name in failing:
        if failing[name]:
            nbdkit.set_error(failing[name])
        raise Boom(name)
    if refuses and name not in BEFORE_OPEN and nbdkit.export_name() == name:
        raise Boom(name)
    return values.get(name, result)


def callback(name):
    def call(*args):
        note(name, args)
        return react(name, DATA[name](*args) if name in DATA else ANSWERS.get(name))

    return call


def do_pread_1(h, count, offset):
    return disk[offset : offset + count]


def do_pread(h, buf, offset, flags):
    if errnos:
        nbdkit.set_error(errnos[offset // 512])
        raise Boom(offset)
    buf[:] = disk[offset : offset + len(buf)]


def do_pwrite(h, buf, offset, flags=0):
    disk[offset : offset + len(buf)] = buf


def do_zero(h, count, offset, how):
    disk[offset : offset + count] = bytes(count)


def do_extents(h, count, offset, flags):
    if extents_of:
        return extents_of[offset - 4096]
    return [(0, 4096, 0), (4096, 8192, 3), (12288, 4096, 2), (16384, 1 << 20, 1)]


BEFORE_OPEN = {
    "config",
    "config_complete",
    "thread_model",
    "get_ready",
    "after_fork",
    "cleanup",
    "preconnect",
    "list_exports",
    "default_export",
    "close",
}
DATA = {
    "pread": do_pread_1 if API_VERSION == 1 else do_pread,
    "pwrite": do_pwrite,
    "zero": do_zero,
    "extents": do_extents,
    "open": lambda readonly: disk,
}
ANSWERS = {
    "get_size": len(disk),
    "thread_model": 1,
    "list_exports": ["one", ("two", "the second")],
    "default_export": "one",
    "export_description": "a description",
    "block_size": (512, 4096, 1 << 20),
    "is_rotational": True,
    "can_multi_conn": True,
    "can_write": True,
    "can_flush": True,
    "can_trim": True,
    "can_zero": True,
    "can_fast_zero": True,
    "can_extents": True,
    "can_fua": 2,
    "can_cache": 2,
}

open = callback("open")
get_size = callback("get_size")
pread = callback("pread")
