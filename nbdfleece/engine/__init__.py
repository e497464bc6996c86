"""Disks, snapshots, checkpoints and their transactions."""
