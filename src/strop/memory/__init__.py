"""Byte formulas and the plan: every derived number with its reason, before anything is loaded."""
