"""Dirty bitmaps: bits, runs, merging. No files."""
