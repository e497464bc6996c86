"""nbdkit's Python plugin API, both ways.

Scripts that were written for nbdkit, served without it:

===============  ================================================================
``script``       a loaded script: calling its callbacks, and what becomes of errors
``lifecycle``    configuring it, in nbdkit's order
``module``       the module ``nbdkit`` that scripts import
``calls``        which client a callback is for
``handle``       what ``open`` returned, with defaults and emulation around it
``gate``         threads, and how many calls a thread model lets run at a time
``session``      a connection: its exports and its handle
``node``         a handle as a block node
``host``         the server
===============  ================================================================

Our images inside a real nbdkit: ``nbdfleece_plugin``, ``image_plugin`` and ``image_parameters``.

What is imported before the server goes to the background (the first five) imports no numpy:
its libraries start threads, which do not survive a fork.
"""
