"""The QMP-compatible control socket."""
