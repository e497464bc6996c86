"""What the NBD protocol asks of a server, as numbered rows that cases refer to.

The numbers are the suite's own and do not change: a new requirement gets a new number. The
wording is ours; ``section`` names the part of ``doc/proto.md`` (or of QEMU's
``docs/interop/nbd.rst``) where the sentence itself stands.
"""

from __future__ import annotations

from typing import NamedTuple


class Requirement(NamedTuple):
    """One row: ``level`` is M (MUST), X (MUST NOT), S (SHOULD) or N (SHOULD NOT)."""

    number: int
    level: str
    wording: str
    section: str


_SECTIONS: list[tuple[str, list[tuple[int, str, str]]]] = [
    (
        "Values",
        [
            (1, "M", "Strings are UTF-8, have no NUL and are at most 4096 bytes long"),
            (2, "S", "TCP sockets are set to TCP_NODELAY"),
        ],
    ),
    (
        "Newstyle negotiation",
        [
            (3, "M", "Send NBDMAGIC, IHAVEOPT and 16 bits of flags before reading anything"),
            (4, "M", "Set FIXED_NEWSTYLE when fixed newstyle is spoken"),
            (5, "X", "Set any handshake flag other than bits 0 and 1"),
            (6, "N", "Change behaviour when the client does not send the matching flag"),
            (7, "M", "Drop a client that sets a client flag unknown or not offered"),
            (8, "X", "Send 124 zero bytes after EXPORT_NAME when NO_ZEROES was agreed"),
            (9, "M", "Skip the data of an option that is not known, by its length"),
            (10, "M", "End the session when EXPORT_NAME cannot be granted"),
            (11, "S", "Refuse oldstyle negotiation on the newstyle port"),
            (12, "M", "Require fixed newstyle for any option but EXPORT_NAME"),
        ],
    ),
    (
        "Fixed newstyle negotiation",
        [
            (13, "M", "Reply to each option but EXPORT_NAME with the reply magic and its number"),
            (14, "M", "Answer unknown options ERR_UNSUP and stay in step"),
            (15, "M", "Reply ACK to ABORT and close"),
            (16, "S", "Ignore data sent with ABORT"),
            (17, "S", "Cope with a client that sends ABORT and closes without reading"),
            (18, "S", "Answer LIST with data ERR_INVALID"),
            (19, "M", "LIST gives SERVER replies, then ACK, or an error"),
            (20, "M", "REP_SERVER's name fits in its reply"),
            (21, "X", "Disconnect for less than a broken MUST, an unanswerable error or an attack"),
            (22, "M", "Otherwise answer options with errors until the client leaves"),
            (23, "S", "While shutting down, answer options ERR_SHUTDOWN"),
            (24, "S", "Shut TLS down before disconnecting"),
            (25, "S", "A repeated stateful option is answered (ACK or ERR_INVALID), not dropped"),
        ],
    ),
    (
        "NBD_OPT_INFO and NBD_OPT_GO",
        [
            (26, "M", "A name longer than the option allows is an error"),
            (27, "M", "Ignore unknown information requests"),
            (28, "X", "Assume that the client honours information it did not ask for"),
            (29, "M", "INFO_EXPORT comes before ACK and is 12 bytes long"),
            (30, "N", "Send INFO before ERR_UNKNOWN"),
            (31, "X", "Send INFO before ERR_TLS_REQD"),
            (32, "X", "ERR_BLOCK_SIZE_REQD for a client that asked for BLOCK_SIZE"),
            (33, "N", "Send INFO for a TLS-only export that hides behind SELECTIVETLS"),
            (34, "M", "INFO and the GO right after it get the same replies"),
            (35, "X", "Padding of zeroes after GO's ACK"),
            (36, "S", "Send each information type at most once"),
            (37, "M", "INFO_NAME and DESCRIPTION are 2 bytes or more, BLOCK_SIZE is 14"),
            (38, "M", "Send BLOCK_SIZE when asked and limits other than the default are enforced"),
            (39, "M", "The empty name is the default export"),
        ],
    ),
    (
        "NBD_OPT_STRUCTURED_REPLY",
        [
            (40, "S", "Answer STRUCTURED_REPLY with data ERR_INVALID"),
            (41, "M", "Use structured replies for READ after the ACK"),
            (42, "N", "Offer extensions of reply payload before structured replies are agreed"),
            (43, "X", "SEND_DF before structured replies are agreed; set after, if supported"),
        ],
    ),
    (
        "Metadata querying",
        [
            (44, "M", "A context's name is namespace:leaf"),
            (45, "M", "The namespace is base, nbd-server, x-* or a registered one"),
            (46, "N", "Use x-* for contexts in wide use"),
            (47, "S", "Document the syntax and meaning of queries"),
            (48, "S", "SET_META_CONTEXT without structured replies is ERR_INVALID"),
            (49, "M", "A query longer than its option is ERR_INVALID"),
            (50, "M", "Ignore queries in unknown namespaces"),
            (51, "M", "Answer a single ACK when nothing matches"),
            (52, "M", "Zero or more META_CONTEXT replies, then ACK, or an error"),
            (53, "M", "LIST without queries gives all contexts"),
            (54, "M", "LIST with queries gives all that match"),
            (55, "S", "LIST gives the id 0"),
            (56, "M", "A name begins with its namespace and a colon"),
            (57, "M", "base: is ignored in SET and a wildcard in LIST"),
            (58, "M", "Ignore unknown leaf names under base:"),
            (59, "N", "Select anything for an empty leaf in SET"),
            (60, "M", "SET without queries selects nothing"),
            (61, "M", "SET gives one reply per selected context, with unique ids, then ACK"),
            (62, "M", "SET replaces what was set before, even when it fails"),
            (63, "M", "Contexts count only when the last SET named GO's export, after STARTTLS"),
            (64, "M", "A context's name is valid UTF-8"),
            (65, "M", "Information fits the 32 bit status field"),
        ],
    ),
    (
        "Transmission flags",
        [
            (66, "M", "HAS_FLAGS is 1"),
            (67, "X", "Set the flag of a feature that is not supported"),
            (68, "M", "Refuse all writes when READ_ONLY is set"),
            (69, "M", "CAN_MULTI_CONN: FLUSH and FUA are seen on all connections when replied"),
            (70, "M", "FAST_ZERO is offered only if supported, and never without WRITE_ZEROES"),
            (71, "M", "Take NO_HOLE when WRITE_ZEROES is offered"),
        ],
    ),
    (
        "TLS support",
        [
            (72, "M", "Be in one of the modes NOTLS, FORCEDTLS, SELECTIVETLS"),
            (73, "M", "Keep the mode for the life of a TCP connection"),
            (74, "M", "Behave as NOTLS unless both sides set fixed newstyle"),
            (75, "X", "NOTLS: ERR_TLS_REQD, ever; STARTTLS gets a permitted error"),
            (76, "M", "FORCEDTLS: STARTTLS gets ACK before TLS and ERR_INVALID after"),
            (77, "M", "Be ready for the TLS handshake right after the ACK"),
            (78, "M", "Terminate when the TLS handshake fails"),
            (79, "M", "FORCEDTLS: ERR_TLS_REQD to all other options before TLS, but not to ABORT"),
            (80, "M", "FORCEDTLS: terminate on EXPORT_NAME before TLS, ERR_TLS_REQD on GO"),
            (81, "X", "ERR_TLS_REQD once TLS is up"),
            (82, "M", "SELECTIVETLS: STARTTLS gets ACK before TLS and ERR_INVALID after"),
            (83, "M", "SELECTIVETLS: a TLS-only export gives ERR_TLS_REQD on INFO and GO"),
            (84, "X", "SELECTIVETLS: ERR_TLS_REQD to options other than INFO and GO"),
            (85, "X", "Keep any state of the negotiation across STARTTLS"),
            (86, "M", "STARTTLS gets ACK or a permitted error; ERR_INVALID with data"),
            (87, "M", "Speak TLS 1.2, later if possible, older not by default"),
            (88, "S", "FORCEDTLS, or TLS-only exports, where a downgrade matters"),
        ],
    ),
    (
        "Block size constraints",
        [
            (89, "S", "Advertise constraints other than the default ones"),
            (90, "S", "The default is minimum 1, preferred 4096, payload of 32 MiB or more"),
            (91, "N", "Refuse clients that ask no sizes when the default ones are supported"),
            (92, "M", "A request outside stricter limits is an error, nothing is corrupted"),
            (93, "M", "The minimum is a power of 2, at most 65536; the size a multiple of it"),
            (94, "M", "The preferred size is a power of 2, at least 512 and the minimum"),
            (95, "M", "The maximum payload is at least the preferred size"),
            (96, "N", "Treat a payload of 32 MiB or less as an attack"),
            (97, "M", "A chunk's variable part keeps to the advertised maximum"),
            (98, "N", "Disconnect on TRIM or WRITE_ZEROES longer than the maximum payload"),
            (99, "S", "EINVAL for unaligned requests and those out of bounds"),
        ],
    ),
    (
        "Transmission",
        [
            (100, "M", "Simple replies only, unless others were agreed"),
            (101, "M", "Echo the cookie as 64 opaque bits, used again or not"),
            (102, "M", "What was replied before a FLUSH is durable when the FLUSH is replied"),
            (103, "X", "Reply to a FUA command before its data is durable"),
            (104, "M", "Take FUA on every command when SEND_FUA is set"),
            (105, "X", "Structured replies without agreement"),
            (106, "X", "A simple reply to READ after structured replies were agreed"),
            (107, "S", "Structured errors carry text"),
            (108, "M", "DONE is set on the last chunk and only there"),
            (109, "S", "Few chunks"),
            (110, "X", "Mark a chunk as last while an error in it is still possible"),
            (111, "X", "Reply flags that were not agreed"),
            (112, "M", "DISC: finish what is outstanding, close, no reply"),
            (113, "S", "Shutting down: finish what is in flight, ESHUTDOWN for the rest"),
            (114, "X", "Disconnect otherwise"),
        ],
    ),
    (
        "Structured reply types",
        [
            (115, "M", "NONE has length 0 and is last"),
            (116, "M", "OFFSET_DATA is 9 bytes or more, inside the request, without overlap"),
            (117, "M", "OFFSET_HOLE is 12 bytes, inside, without overlap, and not empty"),
            (118, "M", "BLOCK_STATUS is 4+8n bytes, n of 1 or more; one chunk per context"),
            (119, "M", "An extent's length is not zero"),
            (120, "M", "REQ_ONE gives exactly one descriptor, not longer than the request"),
            (121, "M", "All extents but the last end before the end of the request"),
            (122, "N", "More than 2^20 extents in a chunk"),
            (123, "M", "ERROR is 6 bytes or more, its error is not zero, its text at most 4096"),
            (124, "M", "ERROR_OFFSET is 14 bytes or more, its offset inside the request"),
            (125, "N", "Mix ERROR_OFFSET with ERROR"),
        ],
    ),
    (
        "NBD_CMD_READ",
        [
            (126, "M", "The reply is simple or structured as agreed"),
            (127, "N", "Disconnect on length 0"),
            (128, "S", "A simple reply sets the error, and has no payload then"),
            (129, "M", "Disconnect on an error after the header of a simple reply was sent"),
            (130, "M", "Chunks have 1 byte or more, multiples of 512 if possible"),
            (131, "X", "Chunks that overlap or leave the request"),
            (132, "M", "Split replies of more than 2^32-8 bytes"),
            (133, "M", "Without an error the whole range is covered"),
            (134, "M", "On an error finish the chunk and send an error chunk, stay connected"),
            (135, "S", "ERROR is the only error chunk; content comes before its error"),
            (136, "M", "DF: one content chunk at most, up to 65536 bytes always"),
        ],
    ),
    (
        "NBD_CMD_WRITE, FLUSH, TRIM, CACHE",
        [
            (137, "N", "Disconnect on WRITE of length 0"),
            (138, "M", "Write, then reply"),
            (139, "M", "Take the payload of a refused WRITE off the stream"),
            (140, "X", "FLUSH succeeds before all replied writes are durable"),
            (141, "M", "FLUSH with an offset or a length is handled consistently"),
            (142, "X", "TRIM touches bytes outside its range"),
            (143, "N", "Disconnect on TRIM of length 0"),
            (144, "X", "CACHE changes the meaning of later commands"),
            (145, "M", "CACHE offered: unknown flags are refused"),
        ],
    ),
    (
        "NBD_CMD_WRITE_ZEROES",
        [
            (146, "M", "Zero, then reply; it reads back as zero even if trimmed"),
            (147, "N", "Disconnect on length 0"),
            (148, "M", "NO_HOLE provisions fully"),
            (149, "X", "ENOTSUP without FAST_ZERO"),
            (150, "M", "FAST_ZERO fails fast with ENOTSUP and alters nothing, or zeroes"),
            (151, "S", "FAST_ZERO that was not offered is EINVAL"),
            (152, "S", "ENOSPC past the end, EPERM on a read-only export"),
        ],
    ),
    (
        "NBD_CMD_BLOCK_STATUS",
        [
            (153, "S", "EINVAL without a negotiated context"),
            (154, "M", "A structured reply with one chunk per context"),
            (155, "M", "One descriptor or more; may describe less than asked"),
            (156, "M", "Descriptors are consecutive from the request's offset"),
            (157, "S", "Equal neighbours are merged; lengths are multiples of 512"),
            (158, "S", "Status other than zero where it is easily known; never a lie"),
            (159, "S", "A failure is an error chunk"),
            (160, "S", "EINVAL beyond the export"),
            (161, "S", "Reserved bits of base:allocation are zero"),
            (162, "N", "Disconnect on length 0"),
        ],
    ),
    (
        "Error values",
        [
            (163, "M", "Only EPERM EIO ENOMEM EINVAL ENOSPC EOVERFLOW ENOTSUP ESHUTDOWN"),
            (164, "S", "ENOSPC for a write past the end"),
            (165, "S", "EINVAL for a read or trim past the end"),
            (166, "S", "EPERM for a write or trim on a read-only export"),
            (167, "N", "EOVERFLOW other than for DF and oversize requests"),
            (168, "N", "ENOTSUP other than for FAST_ZERO"),
            (169, "S", "EINVAL for unknown commands and unknown or misplaced flags"),
            (170, "N", "ENOMEM"),
        ],
    ),
    (
        "Baseline",
        [
            (171, "M", "NOTLS, fixed newstyle, INFO, GO, ABORT, LIST, READ, WRITE, DISC, simple"),
            (172, "S", "TLS, EXPORT_NAME, FLUSH, FUA; block sizes are not required of clients"),
        ],
    ),
    (
        "NBD_OPT_EXTENDED_HEADERS",
        [
            (173, "S", "EXTENDED_HEADERS with data is ERR_INVALID"),
            (174, "X", "Fail GO with ERR_UNSUP afterwards; EXPORT_NAME is dropped"),
            (175, "S", "Works without STRUCTURED_REPLY, which then is ERR_EXT_HEADER_REQD"),
            (176, "X", "Simple or compact replies: all headers are 32 bytes"),
            (177, "M", "Every chunk echoes the request's offset and cookie"),
            (178, "M", "WRITE carries PAYLOAD_LEN"),
            (179, "S", "Disconnect on a payload longer than the maximum"),
            (180, "S", "A payload that the command does not take is consumed, then EINVAL"),
            (181, "X", "BLOCK_STATUS: only BLOCK_STATUS_EXT, 8+16n bytes, with the count n"),
            (182, "M", "The upper 32 bits of a 32 bit context's status are zero"),
            (183, "X", "BLOCK_STATUS_EXT without extended headers"),
            (184, "X", "The flag BLOCK_STATUS_PAYLOAD without extended headers"),
            (185, "M", "Payload of BLOCK_STATUS: wrong size or ids are consumed, then EINVAL"),
            (186, "M", "Contexts of 64 bits are hidden from clients without extended headers"),
            (187, "M", "STARTTLS wipes the state"),
            (188, "S", "Compact clients stay welcome"),
        ],
    ),
    (
        "QEMU's qemu: namespace",
        [
            (189, "M", "qemu:dirty-bitmap:NAME has bit 0 only; the name compares exactly"),
            (190, "M", "qemu:allocation-depth is a 32 bit number, 0 where unallocated"),
            (191, "M", "qemu: and qemu:dirty-bitmap: are wildcards in LIST, nothing in SET"),
            (192, "M", "Extents cover the range; below 2^32 each in compact mode"),
            (193, "M", "An exported bitmap does not change while it is read"),
        ],
    ),
]

REQUIREMENTS: dict[int, Requirement] = {
    number: Requirement(number, level, wording, section)
    for section, rows in _SECTIONS
    for number, level, wording in rows
}

# Rows that no client can see over a socket, and why. What is neither here nor in a case is a
# gap: the suite's own test names it.
NOT_VISIBLE: dict[int, str] = {
    2: "a socket option of the other side; its effect is timing only",
    28: "an assumption in the server, without a message of its own",
    46: "a matter of naming policy",
    47: "a matter of documentation",
    73: "a mode cannot be asked for, only its effects: rows 75, 79, 81, 84",
    88: "advice to the operator",
    110: "seen only as a wrong reply in row 134",
    129: "needs an error after the reply's header was sent; no server can be made to do so",
    132: "needs a request of 4 GiB of data, which no server takes",
    186: "no server has a context of 64 bits",
}
