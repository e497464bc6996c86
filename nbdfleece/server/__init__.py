"""Sockets and the event loop: connections, listeners, shutdown."""
