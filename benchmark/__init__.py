"""nbdfleece against QEMU and nbdkit, side by side: `python -m benchmark`, or `scripts/bench`.

A **row** is one workload. In every round each **contestant** (a server in one configuration)
runs it once, one after the other, so that what disturbs the machine disturbs all of them alike.
Compared is always within a round; the result is the median of the rounds' ratios.

What each module knows:

* :mod:`.place`: folders, programs, what is in the page cache;
* :mod:`.servers`: how each server is started in its best configuration;
* :mod:`.clients`: foreign load generators;
* :mod:`.images`, :mod:`.copies`: what is served, and to servers that write;
* :mod:`.rows`: the workloads;
* :mod:`.measure`: rounds, ratios and their spread;
* :mod:`.run`, :mod:`.version`: a run of rows, which may be split while ours stays the same;
* :mod:`.curves`, :mod:`.growth`, :mod:`.curve_files`, :mod:`.curve_picture`: how cost grows;
* :mod:`.profiles`: where our server's time goes;
* :mod:`.raw_limit`, :mod:`.pull_dirty`: programs of their own, a server and a client;
* :mod:`.report`, :mod:`.picture`: JSON, Markdown, SVG.
"""
