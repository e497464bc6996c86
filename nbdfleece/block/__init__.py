"""Block nodes: files, filters and views behind one small interface."""
