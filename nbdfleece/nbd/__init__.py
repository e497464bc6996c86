"""The NBD wire, sans-IO: no sockets, no asyncio."""
