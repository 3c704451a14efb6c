"""Training and evaluation data: text, images, retrieval probes and questions.

- `text`: packed tokens and their batches; `packing` writes the token files
- `text_sources`: files, folders and data sets of the user; `corpora`: the default text
- `images`: images as a model reads them; `image_sources`: files, folders and data sets of images
- `batch`: what all training data have in common
- `probes`: retrieval probes, with `clozes` of a text; `questions`: questions of the user
- `curriculum`: tokenizer and training rows of the small teacher

Import from the modules. This file has no imports, so that one module does not load the others.
"""
