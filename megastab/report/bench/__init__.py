"""Every figure the project promises, measured side by side in one run; ``docs/bench.md`` says how each is taken.

Contestants live in child processes that step only when told to (``jobs``, ``child``), so that two of them can alternate step by step
on the same machine at the same minute, whatever frameworks they need and however many ranks they are.
"""
