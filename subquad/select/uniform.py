"""Uniform placement: attention layers as evenly spaced as they go. The baseline of every selector."""


def uniform_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layer indices, at the centres of `count` equal stretches."""
    return [int((index + 0.5) * layers / count) for index in range(count)]
