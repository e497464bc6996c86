"""As nbdkit's url.py is: a file behind HTTP, read by ranges."""

import urllib.request

import nbdkit

API_VERSION = 2
url = None


def config(key, value):
    global url
    if key != "url":
        raise RuntimeError(f"unknown parameter: {key}")
    url = value


def config_complete():
    if url is None:
        raise RuntimeError("url parameter is required")


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return 1


def get_size(h):
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        return int(answer.headers["content-length"])


def pread(h, buf, offset, flags):
    span = {"range": f"bytes={offset}-{offset + len(buf) - 1}"}
    with urllib.request.urlopen(urllib.request.Request(url, b"", span)) as answer:
        buf[:] = answer.read()
