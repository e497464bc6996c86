"""nbdfleece against QEMU and nbdkit, side by side: `python -m benchmark`, or `scripts/bench`.

A **row** is one workload. In every round each **contestant** (a server in one configuration)
runs it once, one after the other, so that what disturbs the machine disturbs all of them alike.
Compared is always within a round; the result is the median of the rounds' ratios.

What each module knows:

* :mod:`.place`: folders, programs, what is in the page cache;
* :mod:`.servers`: how each server is started in its best configuration;
* :mod:`.clients`: foreign load generators;
* :mod:`.images`: what is served;
* :mod:`.rows`: the workloads;
* :mod:`.measure`: rounds, ratios and their spread;
* :mod:`.curves`: how cost grows;
* :mod:`.report`, :mod:`.picture`: JSON, Markdown, SVG.
"""
