"""Pretrained models: a Hub id, a folder or a GGUF file becomes a model with its tokenizer."""
