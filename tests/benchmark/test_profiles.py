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


def test_stacks_of_several_processes_are_one_profile() -> None:
    """What py-spy says of a process has semicolons of its own."""
    server = 'process 12:"nbdfleece serve --processes 1";'
    child = 'process 13:"python -c import sys; sys.path = a; main() /b";'
    profile = Profile()
    profile.add([f"{server}f ({HOME}/a.py) 2", f"{server}{child}f ({HOME}/a.py) 3"])
    assert profile.own == profile.whole == {"f (nbdfleece/a.py)": 5}


def test_waiting_threads_are_not_counted_and_uvloop_has_a_name() -> None:
    profile = Profile()
    worker = "_worker (/usr/lib/python3.11/concurrent/futures/thread.py)"
    runner = "Runner.run (/usr/lib/python3.11/asyncio/runners.py)"
    profile.add([f"{worker} 50", f"{worker};f ({HOME}/a.py) 1", f"main (x.py);{runner} 2"])
    assert profile.count == 3
    assert profile.own == {"f (nbdfleece/a.py)": 1, "uvloop itself": 2}
