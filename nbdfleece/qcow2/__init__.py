"""The qcow2 format and the driver that reads and writes it."""
