"""The handshake phase: fixed newstyle negotiation as a state machine without I/O.

The driver's part::

    negotiation = Negotiation(catalogue, limits, tls=mode)
    while True:
        while data := negotiation.data_to_send():
            ...send it...
        if negotiation.outcome is not None:
            break
        ...receive some bytes...
        negotiation.receive_data(received)       # at the end of the stream: receive_eof()

``data_to_send`` is called until it gives nothing. Each call gives the replies to one option, and
they are made as they are taken: a client that sends many options without reading the replies
makes neither pile up, and the driver may serve others between two of them. After an outcome of
:class:`~nbdfleece.nbd.outcomes.StartTls` the driver does the TLS handshake and begins anew with
``Negotiation(catalogue, limits, tls=mode, after=outcome)``.

A catalogue that does not know its answer yet makes the machine stand still with a
:attr:`~Negotiation.lookup`: the driver has it found out, calls :meth:`~Negotiation.resume` and
goes on as if something had been received.

**States.** Each has one method that takes what it needs from the received bytes, or waits.

===============  =====================  =======================================================
state            method                 goes to
===============  =====================  =======================================================
CLIENT_FLAGS     _step_client_flags     OPTION_HEADER
OPTION_HEADER    _step_option_header    OPTION_DATA; OPTION_SKIP if there is too much data
OPTION_DATA      _step_option_data      OPTION_HEADER, having answered the option
OPTION_SKIP      _step_option_skip      OPTION_HEADER, having answered the option
===============  =====================  =======================================================

An outcome ends the machine in whatever state it is. In OPTION_HEADER all options so far have
been answered; only then the end of the stream is a clean one.

**What is remembered** from one option to the next: structured replies or extended headers, and
the contexts that the last SET_META_CONTEXT selected, with the export that it named. All of it
lives in this object, and TLS starts with a new one: nothing that was said in plaintext is
believed, and plaintext that follows STARTTLS without waiting for the reply ends the connection
(CVE-2021-3716).

Spec: proto.md, "Newstyle negotiation", "Fixed newstyle negotiation", "TLS support", "Option
types"; branch extension-ext-header.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final, TypeVar

from .constants import (
    OPTION_MAGIC,
    STRING_BYTES_MAX,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
)
from .errors import OptionError, encode_error_text
from .export_info import Catalogue, ExportInfo, Lookup, NotKnownYet
from .limits import DEFAULT_LIMITS, DEFAULT_PAYLOAD_MAX, Limits
from .names import decode_string, list_contexts, quote_name, select_contexts
from .options import (
    CLIENT_FLAGS,
    OPTION_HEADER,
    InfoRequest,
    pack_export_reply,
    pack_greeting,
    pack_info_block_size,
    pack_info_export,
    pack_info_string,
    pack_meta_context,
    pack_option_reply,
    pack_server,
    parse_context_request,
    parse_info_request,
)
from .outcomes import Closed, Negotiated, Outcome, SelectedContext, StartTls, TlsMode

HANDSHAKE_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
_CLIENT_FLAGS_KNOWN: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)

T = TypeVar("T")

MayAccess = Callable[[ExportInfo], str | None]
"""Says why the client may not have an export, or None if it may."""


def _anybody_may(info: ExportInfo) -> str | None:
    return None


class State(Enum):
    """What the machine waits for."""

    CLIENT_FLAGS = "client flags"
    OPTION_HEADER = "option header"
    OPTION_DATA = "option data"
    OPTION_SKIP = "option data to be skipped"


class Negotiation:
    """The server's side of one handshake.

    Args:
        catalogue: Where the exports are.
        limits: What the client may take.
        tls: The server's TLS mode; the same for the whole connection.
        after: The outcome of the plaintext part, once TLS is up. The client sends no flags and
            the server no greeting again.
        may_access: Called before anything of an export is told or served. A reason is answered
            with ERR_POLICY; LIST leaves the export out.

    Attributes:
        outcome: None while the handshake goes on.
        lookup: What the catalogue must find out before the handshake goes on.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits = DEFAULT_LIMITS,
        *,
        tls: TlsMode = TlsMode.NOTLS,
        after: StartTls | None = None,
        may_access: MayAccess = _anybody_may,
    ) -> None:
        self.outcome: Outcome | None = None
        self.lookup: Lookup | None = None
        self._unanswered = b""
        self._catalogue = catalogue
        self._limits = limits
        self._tls = tls
        self._tls_active = after is not None
        self._may_access = may_access
        self._received = bytearray()
        self._replies = bytearray()
        self._client_flags = ClientFlag(0)
        self._option = 0
        self._option_length = 0
        self._skip_left = 0
        self._options = 0
        self._notes: dict[str, None] = {}
        self._shutting_down = False
        self._structured_replies = False
        self._extended_headers = False
        self._contexts: tuple[SelectedContext, ...] = ()
        self._contexts_export = self._requested = ""
        if after is None:
            self._state = State.CLIENT_FLAGS
            self._replies += pack_greeting(HANDSHAKE_FLAGS)
        else:
            self._state = State.OPTION_HEADER
            self._client_flags = after.client_flags

    # What the driver calls.

    def data_to_send(self) -> bytes:
        """Take what is to be sent next; call it until it gives nothing."""
        data = bytes(self._replies)
        self._replies.clear()
        self._advance()
        return data

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Go on with bytes from the client, cut anywhere.

        Args:
            data: Not kept. Once there is an outcome no more must be given.
        """
        if self.outcome is not None:
            raise RuntimeError("the handshake is over")
        self._received += data
        self._advance()

    def receive_eof(self) -> None:
        """The client has closed its side."""
        if self.outcome is None:
            clean = self._state is State.OPTION_HEADER and not self._received
            self._close(f"the client left, waiting for {self._state.value}", clean=clean)

    def resume(self) -> None:
        """The catalogue knows the answer to :attr:`lookup` now."""
        self.lookup = None
        if self.outcome is None:
            self._answer_option(self._unanswered)

    def shut_down(self) -> None:
        """From now on answer options with ERR_SHUTDOWN.

        Spec: proto.md, "Termination of the session during option haggling".
        """
        self._shutting_down = True

    def take_notes(self) -> list[str]:
        """What the log should say of the last options: limits exceeded, exports refused."""
        notes, self._notes = self._notes, {}
        return list(notes)

    # The machine.

    def _advance(self) -> None:
        while self.outcome is None and not self._replies:
            if self.lookup is not None or not _STEPS[self._state](self):
                return

    def _take(self, length: int) -> bytes | None:
        """The next ``length`` received bytes, or None if there are not so many yet."""
        if len(self._received) < length:
            return None
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _step_client_flags(self) -> bool:
        data = self._take(CLIENT_FLAGS.size)
        if data is None:
            return False
        (flags,) = CLIENT_FLAGS.unpack(data)
        if flags & ~_CLIENT_FLAGS_KNOWN:
            # "the server MUST drop the TCP connection if the client sets an unknown flag"
            self._close(f"unknown client flags {flags:#x}")
        self._client_flags = ClientFlag(flags & _CLIENT_FLAGS_KNOWN)
        self._state = State.OPTION_HEADER
        return True

    def _step_option_header(self) -> bool:
        data = self._take(OPTION_HEADER.size)
        if data is None:
            return False
        magic, self._option, self._option_length = OPTION_HEADER.unpack(data)
        self._options += 1
        reason = self._header_fault(magic)
        if reason is not None:
            self._close(reason)
        elif self._option_length > self._limits.option_length_max:
            self._skip_left = self._option_length
            self._state = State.OPTION_SKIP
        else:
            self._state = State.OPTION_DATA
        return True

    def _header_fault(self, magic: int) -> str | None:
        """Why an option's header is reason enough to drop the connection."""
        option, length, limits = self._option, self._option_length, self._limits
        if magic != OPTION_MAGIC:
            return f"option with magic {magic:#018x}"
        if self._options > limits.options_max:
            return f"more than {limits.options_max} options"
        if length > limits.option_skip_max:
            return f"option {option} with {length} bytes of data"
        if option == Option.EXPORT_NAME and length > STRING_BYTES_MAX:
            return f"export name of {length} bytes"
        if option != Option.EXPORT_NAME and not self._client_flags & ClientFlag.FIXED_NEWSTYLE:
            return f"option {option} from a client that does not know fixed newstyle"
        return None

    def _step_option_data(self) -> bool:
        data = self._take(self._option_length)
        if data is None:
            return False
        self._state = State.OPTION_HEADER
        self._answer_option(data)
        return True

    def _step_option_skip(self) -> bool:
        skipped = min(self._skip_left, len(self._received))
        del self._received[:skipped]
        self._skip_left -= skipped
        if self._skip_left:
            return False
        self._state = State.OPTION_HEADER
        self._answer_option(None)
        return True

    # Answers.

    def _reply(self, reply: OptionReply, data: bytes = b"") -> None:
        self._replies += pack_option_reply(self._option, reply, data)

    def _close(self, reason: str, *, clean: bool = False) -> None:
        self._received.clear()
        self.outcome = Closed(reason, clean)

    def _answer_option(self, data: bytes | None) -> None:
        """Answer the option that was received; ``data`` is None if it was too much to keep."""
        if self._option == Option.SET_META_CONTEXT:
            # "replaces all previously-set metadata contexts (including when this command fails)"
            self._contexts = ()
        try:
            self._check_admissible()
            _ANSWERS.get(self._option, _answer_unknown)(self, self._whole(data))
        except NotKnownYet:
            self._unanswered = data or b""
        except OptionError as error:
            if self._option == Option.EXPORT_NAME:
                self._close(f"EXPORT_NAME refused: {error.text}")
            else:
                if error.reply is OptionReply.ERR_TOO_BIG:
                    self._notes[f"option {self._option} refused: {error.text}"] = None
                self._reply(error.reply, encode_error_text(error.text))

    def _check_admissible(self) -> None:
        """Whether the option may be answered at all at this time."""
        if self._option == Option.ABORT:
            return
        if self._shutting_down:
            raise OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        forced = self._tls is TlsMode.FORCEDTLS and not self._tls_active
        if forced and self._option != Option.STARTTLS:
            raise OptionError(OptionReply.ERR_TLS_REQD, "this server requires TLS")

    def _whole(self, data: bytes | None) -> bytes:
        """The option's data, where the option's rules do not refuse it unread."""
        if self._option in _WITHOUT_DATA and self._option_length:
            raise OptionError(
                OptionReply.ERR_INVALID,
                f"{Option(self._option).name} takes no data, but came with {self._option_length}"
                " bytes",
            )
        if data is None and self._option in _WITH_DATA:
            raise OptionError(
                OptionReply.ERR_TOO_BIG,
                f"{self._option_length} bytes of data are too many, "
                f"{self._limits.option_length_max} are allowed",
            )
        return data or b""

    def _answer_export_name(self, data: bytes) -> None:
        if self._extended_headers:
            # "a client MUST NOT use this option" once extended headers are negotiated.
            raise OptionError(OptionReply.ERR_INVALID, "extended headers were negotiated")
        name = decode_string(data, "export name")
        export = self._find(name)
        self._check_block_size_known(export, InfoRequest(name, frozenset()))
        no_zeroes = bool(self._client_flags & ClientFlag.NO_ZEROES)
        flags = self._transmission_flags(export)
        self._replies += pack_export_reply(export.size, flags, no_zeroes=no_zeroes)
        self._finish(export)

    def _answer_abort(self, data: bytes) -> None:
        self._reply(OptionReply.ACK)
        self._close("the client aborted the handshake", clean=True)

    def _answer_list(self, data: bytes) -> None:
        for export in self._ask(self._catalogue.exports):
            if not self._is_hidden(export) and self._may_access(export) is None:
                self._reply(OptionReply.SERVER, pack_server(export))
        self._reply(OptionReply.ACK)

    def _answer_starttls(self, data: bytes) -> None:
        if self._tls is TlsMode.NOTLS:
            raise OptionError(OptionReply.ERR_POLICY, "this server is not configured for TLS")
        if self._tls_active:
            raise OptionError(OptionReply.ERR_INVALID, "TLS is in use already")
        self._reply(OptionReply.ACK)
        if self._received:
            self._close(f"{len(self._received)} bytes of plaintext after STARTTLS")
        else:
            self.outcome = StartTls(self._client_flags)

    def _answer_info(self, data: bytes) -> None:
        self._describe(parse_info_request(data))

    def _answer_go(self, data: bytes) -> None:
        self._finish(self._describe(parse_info_request(data)))

    def _answer_structured_reply(self, data: bytes) -> None:
        if self._extended_headers:
            raise OptionError(
                OptionReply.ERR_EXT_HEADER_REQD, "extended headers were negotiated already"
            )
        self._structured_replies = True
        self._reply(OptionReply.ACK)

    def _answer_extended_headers(self, data: bytes) -> None:
        self._structured_replies = self._extended_headers = True
        self._reply(OptionReply.ACK)

    def _answer_list_meta_context(self, data: bytes) -> None:
        request = parse_context_request(data, queries_max=self._limits.queries_max)
        export = self._find(request.name)
        for name in list_contexts(export.contexts, request.queries):
            self._reply(OptionReply.META_CONTEXT, pack_meta_context(0, name))
        self._reply(OptionReply.ACK)

    def _answer_set_meta_context(self, data: bytes) -> None:
        if not self._structured_replies:
            raise OptionError(
                OptionReply.ERR_INVALID,
                "metadata contexts need structured replies or extended headers first",
            )
        request = parse_context_request(data, queries_max=self._limits.queries_max)
        export = self._find(request.name)
        selected = select_contexts(export.contexts, request.queries)
        for context_id, name in selected:
            self._reply(OptionReply.META_CONTEXT, pack_meta_context(context_id, name))
        self._reply(OptionReply.ACK)
        self._contexts = tuple(SelectedContext(*pair) for pair in selected)
        self._contexts_export = export.name

    # Exports.

    def _is_hidden(self, export: ExportInfo) -> bool:
        return export.tls_only and not self._tls_active

    def _ask(
        self, question: Callable[[], T], name: str = "", types: frozenset[int] = frozenset()
    ) -> T:
        """Ask the catalogue, or note what it must find out first."""
        try:
            return question()
        except NotKnownYet:
            self.lookup = Lookup(Option(self._option), name, types)
            raise

    def _find(self, name: str, types: frozenset[int] = frozenset()) -> ExportInfo:
        self._requested = name
        export = self._ask(lambda: self._catalogue.find(name), name, types)
        if export is None or self._is_hidden(export):
            raise self._unknown_export(name)
        reason = self._may_access(export)
        if reason is not None:
            self._notes[f"refused: {reason}"] = None
            raise OptionError(OptionReply.ERR_POLICY, reason)
        return export

    def _unknown_export(self, name: str) -> OptionError:
        """Without TLS, exports that do not exist and that are hidden look the same."""
        quoted = quote_name(name)
        hiding = self._tls is TlsMode.SELECTIVETLS and not self._tls_active
        if hiding and self._option in (Option.INFO, Option.GO) and self._hides_exports():
            return OptionError(
                OptionReply.ERR_TLS_REQD, f"export {quoted} is not available without TLS"
            )
        return OptionError(OptionReply.ERR_UNKNOWN, f"export {quoted} is not available")

    def _hides_exports(self) -> bool:
        return any(self._is_hidden(export) for export in self._catalogue.exports())

    def _describe(self, request: InfoRequest) -> ExportInfo:
        """Answer INFO or GO.

        The block sizes are told unasked too: a client that ignores them gets clean errors.
        """
        export = self._find(request.name, request.types)
        if export.tells_block_sizes:
            self._reply(OptionReply.INFO, pack_info_block_size(export))
        self._check_block_size_known(export, request)
        flags = self._transmission_flags(export)
        self._reply(OptionReply.INFO, pack_info_export(export.size, flags))
        if InfoType.NAME in request.types:
            self._reply(OptionReply.INFO, pack_info_string(InfoType.NAME, export.name))
        if InfoType.DESCRIPTION in request.types and export.description:
            data = pack_info_string(InfoType.DESCRIPTION, export.description)
            self._reply(OptionReply.INFO, data)
        self._reply(OptionReply.ACK)
        return export

    def _check_block_size_known(self, export: ExportInfo, request: InfoRequest) -> None:
        """Turn away who did not ask for block sizes, where the export wants it so.

        "The server SHOULD NOT send this error if it is using default size constraints".
        """
        if InfoType.BLOCK_SIZE in request.types or not export.requires_block_size:
            return
        if export.minimum_block_size > 1 or export.maximum_payload < DEFAULT_PAYLOAD_MAX:
            raise OptionError(
                OptionReply.ERR_BLOCK_SIZE_REQD,
                f"export {quote_name(export.name)} requires clients to ask for its block sizes",
            )

    def _contexts_for(self, export: ExportInfo) -> tuple[SelectedContext, ...]:
        """What was selected, if it was for this export and is still offered."""
        if self._contexts_export not in (export.name, self._requested):
            return ()
        offered = dict(enumerate(export.contexts))
        return tuple(c for c in self._contexts if offered.get(c.context_id) == c.name)

    def _transmission_flags(self, export: ExportInfo) -> TransmissionFlag:
        return export.transmission_flags(
            structured_replies=self._structured_replies,
            extended_headers=self._extended_headers,
            contexts_selected=bool(self._contexts_for(export)),
        )

    def _finish(self, export: ExportInfo) -> None:
        self.outcome = Negotiated(
            export=export,
            transmission_flags=self._transmission_flags(export),
            structured_replies=self._structured_replies,
            extended_headers=self._extended_headers,
            contexts=self._contexts_for(export),
            leftover=bytes(self._received),
        )


def _answer_unknown(negotiation: Negotiation, data: bytes) -> None:
    raise OptionError(OptionReply.ERR_UNSUP, "this server does not know the option")


_STEPS: Final = {
    State.CLIENT_FLAGS: Negotiation._step_client_flags,
    State.OPTION_HEADER: Negotiation._step_option_header,
    State.OPTION_DATA: Negotiation._step_option_data,
    State.OPTION_SKIP: Negotiation._step_option_skip,
}

_ANSWERS: Final[dict[int, Callable[[Negotiation, bytes], None]]] = {
    Option.EXPORT_NAME: Negotiation._answer_export_name,
    Option.ABORT: Negotiation._answer_abort,
    Option.LIST: Negotiation._answer_list,
    Option.STARTTLS: Negotiation._answer_starttls,
    Option.INFO: Negotiation._answer_info,
    Option.GO: Negotiation._answer_go,
    Option.STRUCTURED_REPLY: Negotiation._answer_structured_reply,
    Option.LIST_META_CONTEXT: Negotiation._answer_list_meta_context,
    Option.SET_META_CONTEXT: Negotiation._answer_set_meta_context,
    Option.EXTENDED_HEADERS: Negotiation._answer_extended_headers,
}

_WITHOUT_DATA: Final = frozenset(
    {Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS}
)
_WITH_DATA: Final = frozenset(
    {Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}
)
