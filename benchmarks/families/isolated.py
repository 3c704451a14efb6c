"""One family in a process of its own, so that no crash and no endless loop ends the sweep."""

import json
import multiprocessing
from multiprocessing.connection import Connection

import torch
from transformers import logging

from benchmarks.families.checks import Outcome, try_family

LIMIT = 120.0  # seconds for one family
METHODS = multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
PROCESSES.set_forkserver_preload(["benchmarks.families.isolated"])  # imports torch and transformers once for all


def isolated(model_type: str, limit: float = LIMIT) -> Outcome:
    """Outcome of a family, tried in a process of its own; after `limit` seconds it counts as a crash."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_report, args=(sender, model_type), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return Outcome(model_type, outcome="crashes", detail=f"takes more than {limit:.0f} s")
        return Outcome(**json.loads(receiver.recv_bytes()))
    except EOFError:
        process.join()
        return Outcome(model_type, outcome="crashes", detail=f"its process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _report(sender: Connection, model_type: str) -> None:
    """Tries a family and sends its outcome; target of a process."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sender.send_bytes(json.dumps(try_family(model_type).row()).encode())
