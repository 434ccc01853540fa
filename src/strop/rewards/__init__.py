"""Reward functions: the built-in library, the loading of user functions, their combination and the worker pool.

Nothing here imports torch; functions run in worker processes (`worker.py`) that the trainer drives through `pool.py`.
"""
