"""Serving one image without an engine, as qemu-nbd does."""
