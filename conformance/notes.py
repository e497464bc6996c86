"""What is known about deviations: why a server fails a case, for the published matrix.

A note belongs to all servers whose name begins with its first word, and to all cases whose name
has its second. It says what the outcome alone does not: where the cause is, what follows.
"""

from __future__ import annotations

from typing import NamedTuple


class Note(NamedTuple):
    server: str
    case: str
    text: str


NOTES = [
    Note("qemu", "113/", "SIGTERM ends it without regard for what is in flight."),
    Note("qemu", "23/", "SIGTERM ends it without regard for clients that haggle."),
    Note("nbd-server", "113/", "SIGTERM ends it without regard for what is in flight."),
    Note("nbd-server", "23/", "SIGTERM ends it without regard for clients that haggle."),
    Note(
        "qemu",
        "166/write-to-read-only",
        "Every error found while a request is received is sent as EINVAL, whatever it was.",
    ),
    Note("qemu", "166/trim-on-read-only", "As above: EINVAL for every error on receiving."),
    Note("qemu", "152/write-zeroes-on-read-only", "As above: EINVAL for every error on receiving."),
    Note("qemu", "past-the-end-is-enospc", "As above: EINVAL for every error on receiving."),
    Note(
        "qemu",
        "134/bad-sector-is-an-error-chunk",
        "An I/O error in a structured READ without DF closes the connection: a backup over a "
        "disk with one bad sector cannot go on. With DF the error is reported.",
    ),
    Note(
        "qemu-nbd",
        "108/nothing-follows-a-failed-block-status",
        "With several contexts each failing one sends its own ERROR chunk with DONE, so that the "
        "second comes for a request which the client has already seen end.",
    ),
    Note("qemu", "79/abort-before-tls", "ABORT is treated as any other option before TLS."),
    Note(
        "qemu",
        "99/unaligned-requests",
        "The minimum block size is advertised; smaller requests are traced, and served by "
        "reading around them.",
    ),
    Note(
        "qemu",
        "112/outstanding-requests",
        "The socket is closed on DISC: replies that are not yet sent are lost, one even in the "
        "midst of its payload. How many depends on timing.",
    ),
    Note(
        "qemu",
        "148/no-hole",
        "On qcow2 a zero cluster without host cluster is made: reads are right, but a later "
        "write may find no space, and base:allocation says so (hole, zero).",
    ),
    Note(
        "qemu",
        "86/starttls-with-data",
        "ERR_INVALID is answered, then the connection is closed, which needs a reason it lacks.",
    ),
    Note(
        "",
        "names-that-are-not-utf-8",
        "The text of the error repeats the client's bytes, and so is not UTF-8 itself.",
    ),
    Note("", "87/tls-1-1", "GnuTLS's default priorities decide; they still have TLS 1.1."),
    Note(
        "nbdkit",
        "139/payload-of-refused-write-is-taken-from-tls",
        "The payload is skipped on the raw socket, under TLS: the stream is out of step.",
    ),
    Note("nbdkit", "61/context-asked-twice", "The same id is returned twice."),
    Note(
        "nbdkit",
        "14/refused-option-of-client-that-is-not-fixed",
        "The option is answered by an error, but its data stays in the stream.",
    ),
    Note("nbdkit", "107/structured-errors", "Error chunks have an empty text."),
    Note(
        "nbdkit", "23/options-during-shutdown", "Options are answered as if nothing had happened."
    ),
    Note(
        "nbdkit",
        "CVE-2025-47711",
        "The process ends by an assertion: this version has not been fixed.",
    ),
    Note(
        "nbdkit",
        "client-that-never-reads",
        "The process ends by an assertion in raw_send_socket when a client goes away while "
        "several threads have replies for it.",
    ),
    Note(
        "nbdkit",
        "112/outstanding-requests",
        "All replies come, but the connection is not closed after DISC until the client does.",
    ),
    Note("nbdkit", "171/baseline-is-there", "The connection is not closed after DISC."),
    Note("nbdkit", "slow-handshake", "`--timeout` limits it; there is no limit by default."),
    Note(
        "nbdkit",
        "stop-with-clients-in-the-handshake",
        "It waits for clients that are in the handshake, for as long as they like.",
    ),
    Note(
        "nbdkit",
        "157/equal-neighbours",
        "A run of more than 4 GiB is cut at 2^32-1, which is no multiple of 512.",
    ),
    Note("nbdkit", "148/no-hole", "A sparse file is zeroed by punching or left as a hole."),
    Note("nbdkit", "63/contexts-survive", "A GO that fails resets the selected contexts."),
    Note("nbdkit", "63/contexts-of-unknown", "Export names are not looked at here."),
    Note("nbdkit", "172/flush-and-fua", "The file plugin offers no FUA on a read-only export."),
    Note("nbd-server", "abort", "The connection is dropped instead of an ACK."),
    Note("nbd-server", "7/", "Client flags are not looked at."),
    Note("nbd-server", "12/options-of-client", "Client flags are not looked at."),
    Note("nbd-server", "74/client-that-is-not-fixed", "Client flags are not looked at."),
    Note("nbd-server", "34/info-tells", "INFO tells a size of 0: the file is opened by GO."),
    Note(
        "nbd-server",
        "26/",
        "The name is read by the length inside the option, not by the option's: the server "
        "waits for bytes that will not come.",
    ),
    Note("nbd-server", "21/wrong-options", "As for row 26: it waits for bytes."),
    Note(
        "nbd-server", "18/list-with-data", "The data stays in the stream, or is replied to twice."
    ),
    Note("nbd-server", "86/starttls-with-data", "The data stays in the stream."),
    Note("nbd-server", "67/read-only", "WRITE_ZEROES is offered always."),
    Note("nbd-server", "106/", "Early errors are simple replies."),
    Note("nbd-server", "165/libnbd", "libnbd sees the simple reply and gives up."),
    Note("nbd-server", "136/", "DF is offered, but its flag is refused with EINVAL."),
    Note("nbd-server", "43/df-works", "DF is offered, but its flag is refused with EINVAL."),
    Note("nbd-server", "CVE-2017-15119", "Options are drained, however long."),
    Note("nbd-server", "slow-handshake", "There is no time limit."),
]


def note_on(server: str, case: str) -> str:
    """What is known about ``case`` failing on ``server``; empty if nothing is."""
    return " ".join(
        note.text for note in NOTES if server.startswith(note.server) and note.case in case
    )
