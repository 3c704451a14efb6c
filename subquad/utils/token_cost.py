"""Cost of work, counted in tokens that pass through a model."""

from dataclasses import dataclass

TRAINING = 4.0  # forward passes that a training step is worth: the teacher's, the student's, and twice that backwards


@dataclass
class TokenCost:
    """Tokens that go through whole models."""

    forward_tokens: float = 0.0
    training_tokens: float = 0.0

    def seconds(self, tokens_per_second: float) -> float:
        """About how long it takes, from the speed of the teacher's bare forward pass."""
        return (self.forward_tokens + TRAINING * self.training_tokens) / tokens_per_second
