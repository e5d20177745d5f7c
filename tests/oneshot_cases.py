"""Small models with weights that matter, for what is cut without training."""

import timm
import torch

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def make(name="vit_tiny_patch16_224", dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(name, **(SIZES | {"num_classes": 5} | kwargs))
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")) or parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()
