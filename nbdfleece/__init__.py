"""Live qcow2 disks over NBD: dirty bitmaps, checkpoints and copy-before-write snapshots."""

__version__ = "0.1.0"
