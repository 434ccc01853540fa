"""Weights in few bits: formats and kernels that engine and trainer both compute with."""
