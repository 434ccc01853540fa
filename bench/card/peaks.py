"""What a card can do at most, for MFU: one table for all benches."""

from __future__ import annotations

PEAK_TFLOPS = {
    "H100": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200": 989.0, "H200 NVL": 835.0, "A100": 312.0,
    "3090": 71.0, "4090": 165.0, "5090": 209.0,
}  # fmt: skip
"""Part of a card's name -> dense bf16 TFLOP/s with fp32 accumulation, from the vendors' data sheets."""


def peak_tflops(card: str) -> float | None:
    """Return the peak of a card by its name, in TFLOP/s; the longest name that fits counts. None where unknown."""
    found = [name for name in PEAK_TFLOPS if name in card]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def unknown_peak(card: str) -> str:
    """Return what to tell the user of a card without an entry; empty where there is one."""
    if peak_tflops(card) is not None:
        return ""
    return f"{card}: its peak is not in bench/card/peaks.py (PEAK_TFLOPS), so MFU is left empty"
