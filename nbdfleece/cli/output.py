"""Printing results: tables for people, JSON for programs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import click
import msgspec


def print_json(value: Any) -> None:
    """One indented JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout; the headings also if there are no rows."""
    table = [headings, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def format_time(seconds: float) -> str:
    """A time in this place's zone, to the second."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def format_list(words: Sequence[str]) -> str:
    """Words in one cell; a dash if there are none."""
    return ", ".join(words) or "-"
