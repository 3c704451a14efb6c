"""Ctrl-C that waits: long work ends where it can be gone on with, and not in the middle of a step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAIT = b"\nstopping as soon as what is done is saved; Ctrl-C again stops at once\n"


@contextmanager
def interrupt_waits() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is only noted, and what is yielded says whether it was; the second one is as ever.

    The work within asks between two steps, and saves and ends if so. At the end of the block KeyboardInterrupt is
    raised, if there was a Ctrl-C. Where that means something else already (in another thread, or where the process was
    started to ignore it) nothing changes.
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
