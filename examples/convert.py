"""The whole pipeline in Python: load a teacher, align, select, distill, measure, save, generate.

    python examples/convert.py                                 # SmolLM2-135M-Instruct and the default text
    python examples/convert.py Qwen/Qwen2.5-0.5B my-texts/     # another teacher, and a folder or files of your text

`subquad convert` runs the same steps, and adds checkpoints, baselines and a report.
"""

import sys
from pathlib import Path

from accelerate import Accelerator

from subquad import Plan, Student
from subquad.data.text import load_corpus
from subquad.distill.loop import StageInputs, run_stage
from subquad.evaluate import likelihood
from subquad.pretrained.load import load_pretrained
from subquad.recipes.stage import Stage
from subquad.select import Budget, SelectorInputs, choose_plan, make_selector

MIXER, OPTIONS = "hedgehog", {"window": 128, "sinks": 4, "feature_dim": 16}
BUDGET = Budget.parse("50%")  # of the layers keep attention; or cache bytes at a context length: 64MiB@32k
LENGTH = 1024  # tokens of a sequence
ALIGN = Stage(name="align", objective="mixer_output", tokens=8_000, sequence_length=LENGTH, lr=1e-2)
LOGITS = Stage(name="logits", trainable=["*att*"], tokens=20_000, sequence_length=LENGTH, lr_groups={"*.mixer.*": 3e-2})
PROMPT = "My fellow citizens, the year that lies behind us"


def convert(teacher_name: str, sources: list[str] | None, out: Path) -> Student:
    """Convert the teacher on text from `sources` (None: the default text) into the folder `out`."""
    # Load the teacher and the text. Two parts of the text are held out: one to select by, one to measure on.
    accelerator = Accelerator()
    teacher = load_pretrained(teacher_name, device=str(accelerator.device))
    corpus = load_corpus(sources, teacher.tokenizer)

    # Build a plan without attention and a student with this plan. Calibration fits its mixers before any training.
    linear_plan = Plan.by_layer(teacher.shapes, [], MIXER, OPTIONS)
    linear = Student.from_teacher(teacher.model, linear_plan)
    linear.calibrate(corpus.sample(LENGTH).to(linear.device))

    # Align: train each mixer to return the output of the attention that it replaces.
    out.mkdir(parents=True, exist_ok=True)
    run_stage(ALIGN, StageInputs(teacher.model, corpus, accelerator, index=0), student=linear, out=out)

    # Select: restore the attention of one layer at a time, and keep it where it reduces the KL to the teacher most.
    selection_BT = corpus.heldout_batch(1, LENGTH, part="selection")
    ranking = make_selector("kl", {}).run(SelectorInputs(linear, teacher, selection_BT, BUDGET))
    plan, _ = choose_plan(linear, BUDGET, ranking)
    print(f"plan: {plan.pattern()}")

    # Distill: a student with the selected plan starts from the aligned mixers and learns the teacher's distribution.
    student = Student.from_teacher(teacher.model, plan, mixers_from=[linear])
    run_stage(LOGITS, StageInputs(teacher.model, corpus, accelerator, index=1), student=student, out=out)

    # Measure on the other held-out part, compared with the student as it was before distillation.
    models = {"student": student, "aligned": Student.from_teacher(teacher.model, plan, mixers_from=[linear])}
    measures = likelihood(models, teacher.model, corpus.heldout_batch(3, LENGTH), [LENGTH])
    for name, measure in measures.items():
        print(f"{name}: KL {measure['kl'][LENGTH]:.3f} nats, perplexity {measure['perplexity'][LENGTH]:.2f}")
    print(f"cache at 32k tokens: {plan.cache_bytes(32_768) / 2**20:.0f} MiB")

    # Save a folder that transformers loads, and generate.
    student.save_pretrained(out)
    teacher.tokenizer.save_pretrained(out)
    prompt = teacher.tokenizer(PROMPT, return_tensors="pt").to(student.device)
    tokens_BT = student.generate(**prompt, max_new_tokens=40)
    print(teacher.tokenizer.decode(tokens_BT[0]))
    return student


if __name__ == "__main__":
    convert(sys.argv[1] if sys.argv[1:] else "default", sys.argv[2:] or None, Path("runs/example"))
