"""What is said of a student beside its rivals."""

import pytest

from subquad.jobs.baselines import verdicts


def metrics(**rivals):
    """KL by row at 64 tokens; at 8 nobody differs."""
    samples = {"aligned": [0.2, 0.4], "uniform": [0.3, 0.5], "student": [0.1, 0.3], "untrained": [0.2, 0.4]}
    return {name: {"kl_samples": {8: [0.1, 0.1], 64: row}} for name, row in (samples | rivals).items()}


@pytest.mark.parametrize(
    "window, said",
    [
        ([0.2, 0.4], "won at 64 tokens by 0.1000 ± 0.0000 nats, KL 0.2000 against 0.3000"),
        ([0.0, 0.2], "LOST at 64 tokens by 0.1000 ± 0.0000 nats, KL 0.2000 against 0.1000"),
        ([0.1, 0.3], "tied at 64 tokens by 0.0000 ± 0.0000 nats, KL 0.2000 against 0.2000"),
        ([0.1, 0.4], "won at 64 tokens by 0.0500 ± 0.0500 nats, KL 0.2000 against 0.2500, which may be chance"),
    ],
)
def test_verdicts_pair_rows_and_say_what_may_be_chance(window, said):
    spoken = verdicts(metrics(window=window), [64, 2, 8])
    assert len(spoken) == 6  # three comparisons at the two longest contexts
    assert spoken[-1] == f"the student against a training-free window of the same cache bytes: {said}"
    assert all(": tied at 8 tokens" in one for one in spoken[::2])
    assert spoken[1].startswith("the selected plan against the uniform one, both aligned: won at 64")
