"""The inner side of the sandbox: a program of its own, which `sandbox.py` starts as `python -S -m strop.rewards.jail`.

It imports the standard library alone, holds nothing of the run, and is told the program and the inputs of its tests,
never an expected output.
"""
