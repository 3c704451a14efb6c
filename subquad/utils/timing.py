"""Clocks that wait for the device."""

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
