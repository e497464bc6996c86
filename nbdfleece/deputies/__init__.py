"""Processes beside the server's own, each of which serves the clients of some images."""
