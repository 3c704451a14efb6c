"""Text, and probes of retrieval.

`text` packs documents into token files, once, and gives batches; `sources` reads what a user has, `corpora` what
Subquad uses by default; `retrieval` makes probes, with `clozes` of a text, and `questions` reads a user's own. Import
from the modules: this file stays empty so that one does not pull in the others.
"""
