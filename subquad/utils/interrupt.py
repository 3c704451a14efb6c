"""Ctrl-C that waits: long work stops where it can be resumed, not in the middle of a step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAIT = b"\nstopping as soon as what is done is saved; Ctrl-C again stops at once\n"


@contextmanager
def interrupt_waits() -> Iterator[Callable[[], bool]]:
    """Delays the first Ctrl-C to the end of the block; yields a function that returns whether there was one.

    The block calls it between two steps, and saves and ends if so; KeyboardInterrupt is raised afterwards. A second
    Ctrl-C interrupts at once. Nothing changes in another thread, or where Ctrl-C has another handler already.
    """
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        os.write(2, WAIT)  # print() may be what was interrupted, and cannot be entered twice

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:
        raise KeyboardInterrupt
