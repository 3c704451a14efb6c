"""Runs made up for the tests of report: their metrics, plans and files."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

from subquad.plan import AttentionShape, Plan

KEPT = [0, 1, 4, 5, 9, 10, 12, 14, 15, 18, 20, 22, 24, 27, 29]


CACHE_CONTEXTS = (2048, 8192, 32768, 65536, 131072)


VARIANT_KL = {"teacher": 0.0, "student": 0.0432, "aligned": 0.0581, "uniform": 0.0794, "untrained": 0.7461}


HOSTILE = "<script>alert(1)</script> & <b>bold</b> \ud83d half a pair"


def make_plan(layers: int = 30, heads: int = 9, mixed: bool = False) -> Plan:
    shape = AttentionShape(heads=heads, kv_heads=3, head_dim=64, hidden_size=576, window=None)
    rows = [{"attention" if layer in KEPT else "hedgehog": list(range(heads))} for layer in range(layers)]
    if mixed:
        rows[2] = {"attention": [0, 3], "hedgehog": [1, 2, *range(5, heads)], "sliding_window": [4]}
    mixers = {"attention": {}, "hedgehog": {"window": 64, "sinks": 4}, "sliding_window": {"window": 64, "sinks": 4}}
    return Plan(shapes=[shape] * layers, mixers=mixers, layers=rows)


def make_variant(name: str) -> dict:
    kl, kept = VARIANT_KL[name], 30 if name == "teacher" else 0 if name == "window" else 15
    by_context = {256: 0.45 * kl, 1024: kl, 2048: 1.6 * kl}
    answers = {str(c): {"accuracy": max(0.0, 0.75 - 4 * k), "logprob": -0.4 - 9 * k} for c, k in by_context.items()}
    deep = {c: answer | {"by_depth": make_bands(**answer, few=c == "256")} for c, answer in answers.items()}
    starts = dict(zip(by_context, (0, *by_context), strict=False))
    stretches = {
        str(c): {"start": starts[c], "kl": 1.3 * k, "perplexity": 17.0 + k, "top1": math.exp(-2 * k)}
        for c, k in by_context.items()
    }
    grows, fixed = kept * 2 * 3 * 64 * 4, (30 - kept) * (9 * 64 * 129 * 4 + 68 * 2 * 3 * 64 * 4)
    return {
        "kl": {str(c): value for c, value in by_context.items()},
        "kl_stderr": {str(c): 0.04 * value for c, value in by_context.items()},
        "perplexity": {str(c): 16.2 * math.exp(value + 80 / c) for c, value in by_context.items()},
        "top1": {str(c): math.exp(-1.9 * value) for c, value in by_context.items()},
        "buckets": stretches,
        "retrieval": {"copy": answers, "dictionary": deep, "passkey": deep},
        "tasks": {
            "arc_easy": {"acc": {"value": 0.5 - kl / 10, "stderr": 0.02}, "other": {"value": -kl, "stderr": None}}
        },
        "cache_bytes": {str(c): grows * c + fixed for c in CACHE_CONTEXTS},
        "attention_layers": KEPT if kept == 15 else list(range(kept)),
        "plan_pattern": "".join("A" if layer in KEPT else "H" for layer in range(30)),
    }


def make_bands(accuracy: float, logprob: float, few: bool) -> list[dict]:
    """Five bands, the later ones better; of few rows, one has none."""
    found = [{"rows": 2, "accuracy": min(1.0, accuracy * i / 2), "logprob": logprob - 1 / (i + 1)} for i in range(5)]
    return [{"rows": 0}, *found[1:]] if few else found


def make_metrics() -> dict:
    rates = {"align": (61_440, 171.0, 0.44), "align uniform": (15_360, 178.0, 0.46), "logits": (20_480, 78.0, 0.2)}
    return {
        **{name: make_variant(name) for name in VARIANT_KL},
        "stages": [
            {
                "name": name,
                "objective": {"logits": 1.0, "labels": 0.1} if name == "logits" else "mixer_output",
                "seconds": tokens / rate,
                "tokens": tokens,
                "tokens_per_second": rate,
                "share_of_bare_forward": share,
                "bare_forward_tokens_per_second": rate / share,
                "final_loss": 0.112 if name != "logits" else 0.0513,
            }
            for name, (tokens, rate, share) in rates.items()
        ],
        "selection": {"by": "kl", "budget": "50%", "seconds": 64.0, "spent": {"forward_tokens": 8192.0}},
        "teacher_fingerprint": "a0b1c2",
        "text": [{"name": "speeches", "sha256": "d3e4f5"}],
        "sha256": {"model.safetensors": "678901"},
        "seconds": {"load": 2.2, "data": 9.1, "align": 359.3, "logits": 262.6, "total": 577.0},
        "tokens": {"align": 61_440, "logits": 20_480},
        "tokens_per_second": {"align": 171.0, "logits": 78.0},
        "peak_rss_bytes": 3_221_225_472,
        "seed": 0,
        "versions": {"subquad": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.2"},
        "machine": {"cpu": "AMD EPYC 7763", "cores": 2, "memory": "6 GiB", "device": "cpu"},
        "command": "subquad convert default --recipe quick --out runs/quick",
        "commit": "0123abc",
        "samples": [
            {
                "prompt": "Gravity is",
                "teacher": "the force that pulls two masses towards each other.\nIt is the weakest of the four forces.",
                "student": "the force which pulls objects towards the Earth. It is the reason that an apple falls.",
            },
            {"prompt": "The state of the union", "teacher": "is strong.\n\nMy fellow Americans,", "student": HOSTILE},
        ],
        "teacher_name": "SmolLM2-135M-Instruct",
        "verdicts": [
            "The selected plan beats the uniform plan at the same budget: KL 0.058 against 0.079 at 1024.",
            "The student beats the untrained student (0.746) and the training-free window (0.313).",
        ],
    }


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(1)
    make_plan().save(folder / "plan.yaml")
    scores = [0.02 + 0.03 * draw.random() + (0.06 * draw.random() if layer in KEPT else 0) for layer in range(30)]
    order = sorted(range(30), key=lambda layer: -scores[layer])
    chosen = {"by": "kl", "unit": "layer", "mixer": "hedgehog", "scores": scores, "order": order}
    chosen |= {"kl_all_linear": 0.4127, "tokens": 4096, "seconds": 61.4, "seed": 0, "budget": "50%", "chosen": KEPT}
    (folder / "scores.json").write_text(json.dumps(chosen))
    (folder / "metrics.json").write_text(json.dumps(make_metrics()))
    (folder / "recipe.yaml").write_text("name: quick\nteacher: default\nseed: 0\nmixer:\n  name: hedgehog\n")
    with (folder / "log.jsonl").open("w") as log:
        stages = (("align", 0.9, 0.11, 120), ("align uniform", 0.9, 0.13, 60), ("logits", 0.075, 0.051, 40))
        for stage, (name, start, end, steps) in enumerate(stages):
            for step in range(1, steps + 1):
                loss = (end + (start - end) * math.exp(-6 * step / steps)) * (1 + 0.1 * draw.gauss(0, 1))
                line = {"stage": stage, "name": name, "step": step, "tokens": 512 * step, "loss": loss, "lr": 1e-3}
                log.write(json.dumps(line) + "\n")
    return folder


class Page(HTMLParser):
    """Collects tags with their attributes, ids, and visible text; checks that tags close in order."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
