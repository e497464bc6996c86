"""nbdkit's Python plugin API, both ways."""
