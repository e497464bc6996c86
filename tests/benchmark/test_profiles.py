"""Stacks that py-spy wrote, counted."""

from __future__ import annotations

from benchmark.profiles import Profile

HOME = "/home/u/nbdfleece-1/nbdfleece"


def test_own_time_is_the_innermost_functions_and_recursion_counts_once() -> None:
    profile = Profile()
    profile.add(
        [
            f"run (/usr/lib/python3.11/asyncio/base.py);read ({HOME}/block/file.py) 3",
            f"run (/usr/lib/python3.11/asyncio/base.py);f ({HOME}/a.py);f ({HOME}/a.py) 2\n",
        ]
    )
    assert profile.count == 5
    assert profile.own == {"read (nbdfleece/block/file.py)": 3, "f (nbdfleece/a.py)": 2}
    assert profile.whole["f (nbdfleece/a.py)"] == 2
    assert profile.whole["run (asyncio/base.py)"] == 5
