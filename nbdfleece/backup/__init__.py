"""The client side: pull and restore over libnbd, against any NBD server."""
