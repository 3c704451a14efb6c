"""Families of transformers, one of each kind of architecture, through the checks of benchmarks/families."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families import checks
from benchmarks.families.__main__ import RESULTS, main
from benchmarks.families.checks import Outcome, try_family
from benchmarks.families.isolated import isolated
from benchmarks.families.page import END, HEADINGS, START, filled, summary
from benchmarks.families.tiny import CLASSES, LAYERS, families, make_tiny, parts, shrunken, tiny_config
from subquad.model.layer_call import ForwardContext

ROOT = Path(__file__).parents[2]
TEACHERS = {  # kind of architecture -> family; test_student.py and test_hybrid_teachers.py have more
    "one key and value head": "gpt_bigcode",
    "experts": "mixtral",
    "an encoder made causal": "bert",
    "text part of a wrapper": "gemma3",
    "image classifier": "vit",
    "image encoder": "siglip_vision_model",
    "rotary embedding of patches only": "dinov3_vit",
}
DETAILS = {"bert": "as a student in Python; subquad convert needs a linear output head"}
REFUSED = {  # family -> words of the sentence
    "bloom": "does not call transformers' attention interface",
    "doge": "reads its cached keys and values outside of attention",
    "mamba2": "does not call transformers' attention interface",
}


@pytest.mark.parametrize("family", [pytest.param(family, id=kind) for kind, family in TEACHERS.items()])
def test_every_kind_of_architecture_works(family):
    outcome = try_family(family)
    assert (outcome.outcome, outcome.detail, outcome.step) == ("works", DETAILS.get(family, ""), "")
    assert all(number <= checks.TOLERANCE for name, number in outcome.numbers.items() if name != "other head")
    assert outcome.numbers["all attention"] < 1e-6 and outcome.numbers["restored"] < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_converted_is_refused_in_a_sentence(family):
    outcome = try_family(family)
    assert outcome.outcome == "refused" and outcome.step == "find its attention"
    assert REFUSED[family] in outcome.detail and outcome.model in outcome.detail


def test_a_teacher_that_deviates_from_itself_is_not_held_against_its_student():
    """Positions of BART's decoder count columns, pads too."""
    outcome = try_family("bart")
    assert outcome.outcome == "teacher" and outcome.detail.startswith("padded, it deviates from itself by")
    assert outcome.numbers["teacher: padded"] > 0.1 and outcome.numbers["restored"] < 1e-5


def test_a_student_that_is_not_its_teacher_is_caught(monkeypatch):
    monkeypatch.setattr(checks, "attending", lambda layers: ForwardContext())  # restores nothing
    outcome = try_family("llama")
    assert outcome.outcome == "deviates" and outcome.step == "restore every layer of a mixed plan"
    assert outcome.numbers["restored"] > 0.01


def test_a_model_that_sees_later_tokens_does_not_work():
    def both_ways(family):
        config = tiny_config(family)
        config.is_decoder = False
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    outcome = try_family("bert", both_ways)
    assert outcome.numbers["teacher: later token"] > 0.01
    assert outcome.outcome in ("refused", "deviates")


def test_an_exception_is_a_crash_of_one_family(monkeypatch):
    monkeypatch.setattr(checks, "shapes_of", lambda teacher: 1 / 0)
    outcome = try_family("llama")
    assert outcome == Outcome(
        "llama", "LlamaForCausalLM", "crashes", "ZeroDivisionError: division by zero", "find its attention",
        {"teacher: cached": outcome.numbers["teacher: cached"], "teacher: later token": 0.0},
    )  # fmt: skip


def test_a_family_that_cannot_be_made_has_a_reason():
    outcome = try_family("musicgen")
    assert outcome.outcome == "teacher" and "MusicgenConfig" in outcome.detail and outcome.step == "make the teacher"


def test_every_kind_of_layer_is_kept():
    """Per-layer lists are cut together, to the layers that show each of their values first."""
    default = AutoConfig.for_model("qwen3_next")
    assert default.num_hidden_layers > 10 and [*default.layer_types[:4]] == [
        *["linear_attention"] * 3,
        "full_attention",
    ]
    config = tiny_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "linear_attention", "full_attention"]
    assert config.num_hidden_layers == LAYERS and config.hidden_size == 64 and config.num_experts == 4
    smollm3 = tiny_config("smollm3")  # the fourth layer is the first without rotary embedding
    assert smollm3.no_rope_layers == [1, 1, 0] and len(smollm3.layer_types) == 3
    wrapper = shrunken(AutoConfig.for_model("gemma3"))["text_config"]
    assert wrapper["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.slow
def test_every_family_has_a_tiny_configuration():
    names = [*families(), *families(CLASSES)]
    assert len(names) > 200
    sizes = {}
    for name in names:
        if name != "gemma4_assistant":  # whose default is no valid configuration
            sizes[name] = max(getattr(part, "vocab_size", None) or 0 for part in parts(tiny_config(name)))
    assert sizes["llama"] == 97 and max(sizes.values()) < 300


def test_a_tiny_model_is_the_same_every_time():
    one, other = make_tiny("llama").state_dict(), make_tiny("llama").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert one["lm_head.weight"].std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.slow
def test_a_family_that_takes_too_long_does_not_end_the_sweep(tmp_path, capsys):
    assert isolated("llama", limit=0).detail == "takes more than 0 s"
    main(["--family", "mamba2", "bloom", "--out", str(tmp_path / "out.json")])
    main(["--family", "bloom", "llama", "--resume", "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["family"]: row["outcome"] for row in rows} == {
        "bloom": "refused",
        "llama": "works",
        "mamba2": "refused",
    }
    assert capsys.readouterr().out.count("bloom") == 1


def test_the_page_is_what_the_results_say():
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert filled(page, report) == page, "python -m benchmarks.families --page docs/families.md writes it"
    assert {row["family"] for row in report["rows"]} == {*families(), *families(CLASSES)}
    assert summary(report["rows"]) in page and all(row["outcome"] in HEADINGS for row in report["rows"])


def test_families_with_one_reason_share_a_line():
    row = partial(dict, outcome="refused", step="find its attention", numbers={})
    rows = [row(family="a", model="AModel", detail="AModel is | odd"), row(family="b", model="B", detail="B is | odd")]
    report = {"rows": rows, "versions": {"transformers": "5", "torch": "2"}, "date": "2030-01-01", "command": "c"}
    text = filled(f"before {START} old {END} after", report)
    assert "| refused | it is \\| odd | `a`, `b` |" in text and "old" not in text
    assert text.startswith("before ") and text.endswith(" after")
