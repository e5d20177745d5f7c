"""What a training stage can be told: timm's names, the paper's values, and what digits need.

Nothing heavy is imported here, so that the command line can list every option at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import VitslimError


def _option(default: Any, text: str, *, free: bool = False) -> Any:
    """A field with its help. One that is free decides how, not what, and may differ on resuming."""
    return dataclasses.field(default=default, metadata={"help": text, "free": free})


@dataclasses.dataclass(frozen=True)
class Settings:
    """One stage of training: dense, search or retrain. The defaults are DeiT's, as in the paper."""

    data: str = _option("digits", "digits, folder:PATH (PATH/train, PATH/val) or a timm dataset")
    data_dir: str | None = _option(None, "where a timm dataset lives", free=True)
    train_split: str = _option("train", "split of a timm dataset to train on")
    val_split: str = _option("validation", "split of a timm dataset to evaluate on")
    train_num_samples: int | None = _option(None, "images of a training stream of unknown length")
    val_num_samples: int | None = _option(None, "the same of the held-out stream")
    synthetic: bool = _option(False, "random images that are never read, for measuring speed")
    bad_images: str = _option("stop", "an image that cannot be read: stop, or skip it", free=True)
    epochs: int = _option(300, "passes over the training images")
    batch_size: int = _option(1024, "images at a time in each process")
    global_batch_size: int | None = _option(
        None, "images per update over all processes, instead of --batch-size"
    )
    grad_accum_steps: int = _option(1, "batches per update of the weights", free=True)
    opt: str = _option("adamw", "timm optimiser")
    lr: float | None = _option(None, "learning rate; default: lr-base * images per update / 512")
    lr_base: float = _option(5e-4, "learning rate for 512 images per update")
    min_lr: float = _option(1e-5, "learning rate at the end of the schedule")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    warmup_epochs: int = _option(5, "epochs of warm-up")
    sched: str = _option("cosine", "timm schedule; none keeps the rate constant")
    weight_decay: float = _option(0.05, "weight decay; masks, biases and norms have none")
    clip_grad: float | None = _option(None, "clip the gradient at this")
    clip_mode: str = _option("norm", "how: norm, value or agc")
    smoothing: float = _option(0.1, "label smoothing")
    mixup: float = _option(0.8, "mixup alpha, 0 for none")
    cutmix: float = _option(1.0, "cutmix alpha, 0 for none")
    mixup_prob: float = _option(1.0, "share of batches that mixup or cutmix is applied to")
    mixup_switch_prob: float = _option(0.5, "share of those that get cutmix, where both are on")
    mixup_off_epoch: int = _option(0, "epoch from which neither is applied, 0 for never")
    drop_path: float | None = _option(0.1, "stochastic depth of the deepest block")
    aa: str | None = _option("rand-m9-mstd0.5-inc1", "AutoAugment policy, none for none")
    aug_repeats: int = _option(0, "repeated augmentation: how often an image is in one pass")
    color_jitter: float | None = _option(0.3, "colour jitter, where aa is none")
    reprob: float = _option(0.25, "probability of random erasing")
    remode: str = _option("pixel", "random erasing: const, rand or pixel")
    hflip: float = _option(0.5, "probability of a horizontal flip")
    scale: tuple[float, float] = _option((0.08, 1.0), "area of a random crop, two fractions")
    ratio: tuple[float, float] = _option((0.75, 4 / 3), "aspect of a random crop, two numbers")
    train_interpolation: str = _option("bicubic", "bilinear, bicubic or random")
    crop_pct: float | None = _option(None, "evaluation: share of the image in the centre crop")
    no_aug: bool = _option(False, "no augmentation at all")
    model_ema: bool = _option(False, "keep a moving average of the weights; it is the result")
    model_ema_decay: float = _option(0.9998, "decay of that average per update")
    model_ema_warmup: bool = _option(False, "let that decay grow from 0")
    amp: bool = _option(False, "autocast to 16 bits; masks, penalty and loss stay float32")
    amp_dtype: str = _option("bfloat16", "of autocast: bfloat16 or float16")
    compile: bool = _option(False, "torch.compile the whole model as one graph", free=True)
    channels_last: bool = _option(False, "channels_last memory format", free=True)
    grad_checkpointing: bool = _option(
        False, "recompute blocks in the backward pass to save memory", free=True
    )
    fsdp: bool = _option(False, "shard the model over processes (FSDP2)", free=True)
    seed: int = _option(42, "seed of everything random")
    workers: int = _option(4, "processes that load images; 0 loads in the main one", free=True)
    threads: int | None = _option(
        None, "CPU threads while training; none for torch's own choice", free=True
    )
    device: str = _option("auto", "auto (CUDA where there is one), cpu or cuda", free=True)
    checkpoint_steps: int = _option(
        1000, "updates between checkpoints within an epoch, 0 for none", free=True
    )
    checkpoint_keep: int = _option(2, "newest checkpoints that are kept", free=True)
    tensorboard: bool = _option(False, "write TensorBoard files too", free=True)
    teacher: str | None = _option(
        None, "model to imitate: dense (the one started from), a timm name or a saved folder"
    )
    distill_type: str = _option("soft", "imitate logits (soft or hard) or features (feature)")
    distill_loss_weight: float = _option(0.0, "weight of imitating the teacher")
    task_loss_weight: float = _option(1.0, "weight of the labels beside it")
    distill_temperature: float = _option(1.0, "temperature of soft distillation")
    l1_attention: float = _option(2e-4, "penalty on attention masks")
    l1_mlp: float = _option(5e-5, "penalty on MLP masks")
    l1_token: float = _option(1e-4, "penalty on token gates")
    l1_per: str = _option("kind", "how penalties are spread: kind (the paper's), unit or mac")
    l1_step: str = _option("subgradient", "subgradient (the paper's), or proximal: to exact zero")
    l1_warmup_epochs: float = _option(0.0, "epochs in which penalties grow from zero")
    mask_lr_scale: float = _option(1.0, "learning rate of masks over that of weights")
    forecast: bool = _option(
        True, "evaluate the model cut to each budget after every epoch", free=True
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise VitslimError(
                    f"--{name.replace('_', '-')} is one of {', '.join(choices)}, "
                    f"not {getattr(self, name)!r}."
                )
        for name in ("epochs", "batch_size", "grad_accum_steps", "checkpoint_keep"):
            if getattr(self, name) < 1:
                raise VitslimError(f"--{name.replace('_', '-')} must be at least 1.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise VitslimError(
                f"Mixup needs an even batch size, not {self.batch_size}: "
                "change --batch-size or set --mixup 0 --cutmix 0."
            )


_CHOICES = {
    "bad_images": ("stop", "skip"),
    "clip_mode": ("norm", "value", "agc"),
    "amp_dtype": ("bfloat16", "float16"),
    "distill_type": ("soft", "hard", "feature"),
    "l1_per": ("kind", "unit", "mac"),
    "l1_step": ("subgradient", "proximal"),
}
STAGES = ("dense", "search", "retrain")

# Settings that mean something in one stage only.
ONLY_IN = {
    "l1_attention": ("search",),
    "l1_mlp": ("search",),
    "l1_token": ("search",),
    "l1_per": ("search",),
    "l1_step": ("search",),
    "l1_warmup_epochs": ("search",),
    "mask_lr_scale": ("search",),
    "forecast": ("search",),
    "teacher": ("search", "retrain"),
    "distill_type": ("search", "retrain"),
    "distill_loss_weight": ("search", "retrain"),
    "task_loss_weight": ("search", "retrain"),
    "distill_temperature": ("search", "retrain"),
}


def belongs(name: str, stage: str) -> bool:
    """Returns whether a setting means something in a stage."""
    return stage in ONLY_IN.get(name, STAGES)


# The paper searches 50 epochs at a constant rate and retrains 300 epochs with a cosine.
PAPER: dict[str, dict[str, Any]] = {
    "dense": {},
    "search": {
        "epochs": 50,
        "lr": 5e-4,
        "sched": "none",
        "warmup_epochs": 0,
        "weight_decay": 1e-3,
    },
    "retrain": {},
}

# 1437 images of 8x8 want little of what ImageNet wants: small shifts and turns, no flips. One
# thread is nearly as fast as two on a model this small, and does not stall on a busy machine.
_DIGITS: dict[str, Any] = {
    "batch_size": 32,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": None,
    "aa": None,
    "color_jitter": None,
    "reprob": 0.0,
    "hflip": 0.0,
    "scale": (0.8, 1.0),
    "ratio": (0.85, 1.18),
    "train_interpolation": "bilinear",
    "crop_pct": 1.0,
    "clip_grad": 1.0,
    "workers": 0,
    "threads": 1,
}
DIGITS: dict[str, dict[str, Any]] = {
    "dense": {**_DIGITS, "epochs": 45, "lr": 1e-3, "warmup_epochs": 3},
    "search": {
        **_DIGITS,
        "epochs": 15,
        "lr": 5e-4,
        "mask_lr_scale": 10.0,
        "l1_attention": 1e-3,
        "l1_mlp": 2e-4,
        "l1_token": 1e-3,
    },
    "retrain": {**_DIGITS, "epochs": 40, "lr": 1e-3, "warmup_epochs": 1},
}


def settings_for(stage: str, given: Mapping[str, Any]) -> Settings:
    """Makes the settings of a stage: defaults, the paper's, the data's own, then what was given.

    Args:
        stage: `dense`, `search` or `retrain`.
        given: What the user chose, by field name.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise VitslimError(f"Unknown option in {stage}: {', '.join(unknown)}.")
    chosen = {**PAPER[stage]}
    if given.get("data", Settings.data) == "digits":
        chosen |= DIGITS[stage]
    chosen |= {name: _typed(name, value) for name, value in given.items()}
    return Settings(**chosen)


def _typed(name: str, value: Any) -> Any:
    """Accepts what YAML gives: lists for pairs, `none` for nothing, 1e-3 read as text."""
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    if isinstance(value, str) and value.lower() == "none" and "None" in kind:
        return None
    try:
        if isinstance(value, list | tuple):
            return tuple(float(part) for part in value)
        if "float" in kind and value is not None and not isinstance(value, bool):
            return float(value)
        if kind.startswith("int") and value is not None:
            if int(value) != float(value):
                raise ValueError
            return int(value)
    except (TypeError, ValueError):
        raise VitslimError(f"Option {name} cannot be {value!r}: {kind} is needed.") from None
    if field.type is bool and not isinstance(value, bool):
        raise VitslimError(f"Option {name} must be true or false, not {value!r}.")
    return value
