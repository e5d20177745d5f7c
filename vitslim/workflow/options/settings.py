"""What a training stage can be told: timm's names, the paper's values, and what digits need.

Nothing heavy is imported here, so that the command line can list every option at once.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...errors import VitslimError
from .option import STAGES, check_value, option, read_value
from .recipes import open_recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """One stage of training: dense, search, retrain or finetune.

    The defaults are DeiT's, as in the paper, but for its three repeats of every image.
    """

    data: str = option("digits", "digits, folder:PATH (PATH/train, PATH/val) or a timm dataset")
    data_dir: str | None = option(None, "where a timm dataset lives", free=True)
    train_split: str = option("train", "split of a timm dataset to train on")
    val_split: str = option("validation", "split of a timm dataset to evaluate on")
    input_key: str | None = option(
        None, "column of a timm dataset with the images [the only one of images]"
    )
    target_key: str | None = option(None, "column with the labels [label, or the only one of them]")
    train_num_samples: int | None = option(
        None, "images of a training stream of unknown length", least=1
    )
    val_num_samples: int | None = option(None, "the same of the held-out stream", least=1)
    synthetic: bool = option(False, "random images that are never read, for measuring speed")
    bad_images: str = option(
        "stop",
        "an image that cannot be read: stop, or skip it",
        free=True,
        choices=("stop", "skip"),
    )
    epochs: int = option(300, "passes over the training images", least=1)
    batch_size: int = option(1024, "images at a time in each process", least=1)
    global_batch_size: int | None = option(
        None, "images per update over all processes, instead of --batch-size", least=1
    )
    grad_accum_steps: int = option(1, "batches per update of the weights", free=True, least=1)
    opt: str = option("adamw", "timm optimiser")
    lr: float | None = option(
        None, "learning rate; default: lr-base * images per update / 512", least=0
    )
    lr_base: float = option(5e-4, "learning rate for 512 images per update", least=0)
    min_lr: float = option(1e-5, "learning rate at the end of the schedule", least=0)
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", least=0)
    warmup_epochs: int = option(5, "epochs of warm-up", least=0)
    sched: str = option("cosine", "timm schedule; none keeps the rate constant")
    weight_decay: float = option(0.05, "weight decay; masks, biases and norms have none", least=0)
    layer_decay: float | None = option(
        None,
        "rate of a layer over that of the next one, none for equal rates",
        above=0,
        most=1,
    )
    freeze: bool = option(False, "train the classifier alone, a linear probe; --lr 1e-3 suits")
    clip_grad: float | None = option(None, "clip the gradient at this", above=0)
    clip_mode: str = option("norm", "how: norm, value or agc", choices=("norm", "value", "agc"))
    smoothing: float = option(0.1, "label smoothing", least=0, below=1)
    mixup: float = option(0.8, "mixup alpha, 0 for none", least=0)
    cutmix: float = option(1.0, "cutmix alpha, 0 for none", least=0)
    mixup_prob: float = option(
        1.0, "share of batches that mixup or cutmix is applied to", least=0, most=1
    )
    mixup_switch_prob: float = option(
        0.5, "share of those that get cutmix, where both are on", least=0, most=1
    )
    mixup_off_epoch: int = option(0, "epoch from which neither is applied, 0 for never", least=0)
    drop_path: float | None = option(0.1, "stochastic depth of the deepest block", least=0, below=1)
    aa: str | None = option("rand-m9-mstd0.5-inc1", "AutoAugment policy, none for none")
    aug_repeats: int = option(
        0, "repeated augmentation: how often an image is in one pass", least=0
    )
    color_jitter: float | None = option(0.3, "colour jitter, where aa is none", least=0)
    reprob: float = option(0.25, "probability of random erasing", least=0, most=1)
    remode: str = option(
        "pixel", "what random erasing puts there", choices=("const", "rand", "pixel")
    )
    hflip: float = option(0.5, "probability of a horizontal flip", least=0, most=1)
    scale: tuple[float, float] = option(
        (0.08, 1.0), "area of a random crop, two fractions", above=0, most=1
    )
    ratio: tuple[float, float] = option(
        (0.75, 4 / 3), "aspect of a random crop, two numbers", above=0
    )
    train_interpolation: str = option(
        "bicubic", "how crops are resized", choices=("bilinear", "bicubic", "random")
    )
    crop_pct: float | None = option(
        None, "evaluation: share of the image in the centre crop", above=0
    )
    no_aug: bool = option(False, "no augmentation of single images: mixup has options of its own")
    model_ema: bool = option(False, "keep a moving average of the weights; it is the result")
    model_ema_decay: float = option(0.9998, "decay of that average per update", least=0, most=1)
    model_ema_warmup: bool = option(False, "let that decay grow from 0")
    amp: bool = option(False, "autocast to 16 bits; masks, penalty and loss stay float32")
    amp_dtype: str = option(
        "bfloat16", "of autocast: bfloat16 or float16", choices=("bfloat16", "float16")
    )
    compile: bool = option(
        False, "torch.compile the model: one graph, or with --fsdp one of each block", free=True
    )
    channels_last: bool = option(False, "channels_last memory format", free=True)
    grad_checkpointing: bool = option(
        False, "recompute blocks in the backward pass to save memory", free=True
    )
    fsdp: bool = option(False, "shard the model over processes (FSDP2)")
    seed: int = option(42, "seed of everything random", least=0, below=2**32)
    workers: int = option(
        4, "processes that load images; 0 loads in the main one", free=True, least=0
    )
    threads: int | None = option(
        None, "CPU threads while training; none for torch's own choice", free=True, least=1
    )
    device: str = option("auto", "auto (CUDA where there is one), cpu or cuda", free=True)
    checkpoint_steps: int = option(
        1000, "updates between checkpoints within an epoch, 0 for none", free=True, least=0
    )
    checkpoint_keep: int = option(2, "newest checkpoints that are kept", free=True, least=1)
    tensorboard: bool = option(False, "write TensorBoard files too", free=True)
    teacher: str | None = option(
        None, "model to imitate: dense (the one started from), a timm name or a saved folder"
    )
    distill_type: str = option(
        "soft",
        "imitate logits (soft or hard) or features (feature)",
        choices=("soft", "hard", "feature"),
    )
    distill_loss_weight: float = option(0.0, "weight of imitating the teacher", least=0)
    task_loss_weight: float = option(1.0, "weight of the labels beside it", least=0)
    distill_temperature: float = option(1.0, "temperature of soft distillation", above=0)
    l1_attention: float = option(2e-4, "penalty on attention masks", least=0)
    l1_mlp: float = option(5e-5, "penalty on MLP masks", least=0)
    l1_token: float = option(1e-4, "penalty on token gates", least=0)
    l1_per: str = option(
        "kind",
        "how penalties are spread: kind (the paper's), unit or mac",
        choices=("kind", "unit", "mac"),
    )
    l1_step: str = option(
        "subgradient",
        "subgradient (the paper's), or proximal: to exact zero",
        choices=("subgradient", "proximal"),
    )
    l1_warmup_epochs: float = option(0.0, "epochs in which penalties grow from zero", least=0)
    mask_lr_scale: float = option(1.0, "learning rate of masks over that of weights", least=0)
    forecast: bool = option(
        True, "evaluate the model cut to each budget after every epoch", free=True
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_device(self.device)
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise VitslimError(
                f"Mixup needs an even batch size, not {self.batch_size}: "
                "change --batch-size or set --mixup 0 --cutmix 0."
            )

    def among(self, processes: int) -> "Settings":
        """Returns the settings of one of several processes: its share of the global batch."""
        if self.global_batch_size is None:
            return self
        each, rest = divmod(self.global_batch_size, processes * self.grad_accum_steps)
        if rest or not each:
            raise VitslimError(
                f"--global-batch-size {self.global_batch_size} cannot be shared among {processes} "
                f"processes with --grad-accum-steps {self.grad_accum_steps}: give a multiple."
            )
        return dataclasses.replace(self, batch_size=each, global_batch_size=None)

    def images_per_update(self, processes: int) -> int:
        """Returns how many images one update of the weights has seen, over all processes."""
        return self.among(processes).batch_size * processes * self.grad_accum_steps

    def gentler(self) -> "Settings":
        """Returns what suits a model that is near its goal: a quarter of the epochs, a tenth of the
        rates. On digits, 40 epochs at 1e-3 lost what a compressed model had kept (98.6 to 95.8 %).
        """
        epochs = -(-self.epochs // 4)
        return dataclasses.replace(
            self,
            epochs=epochs,
            warmup_epochs=min(self.warmup_epochs, epochs // 4),
            lr=None if self.lr is None else self.lr / 10,
            lr_base=self.lr_base / 10,
            min_lr=self.min_lr / 10,
            warmup_lr=self.warmup_lr / 10,
        )

    def binding(self, processes: int) -> dict[str, Any]:
        """Returns what must be the same when a stage goes on, with any number of processes."""
        fields = dataclasses.fields(self)
        names = {field.name for field in fields if not field.metadata["free"]}
        chosen = {name: getattr(self, name) for name in names - {"batch_size", "global_batch_size"}}
        return {**chosen, "images_per_update": self.images_per_update(processes)}


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}

# Groups of the help, each by the setting that it begins with.
GROUPS = {
    "data": "data",
    "epochs": "optimisation",
    "smoothing": "augmentation and regularisation",
    "model_ema": "average of the weights",
    "amp": "precision and speed",
    "seed": "machine",
    "checkpoint_steps": "checkpoints",
    "teacher": "distillation",
    "l1_attention": "masks",
}

# Settings that are one for a whole run.
OF_THE_RUN = (
    "data",
    "data_dir",
    "train_split",
    "val_split",
    "input_key",
    "target_key",
    "train_num_samples",
    "val_num_samples",
    "synthetic",
    "bad_images",
    "device",
    "seed",
)

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
    "freeze": ("dense", "finetune"),
    **dict.fromkeys(
        (
            "teacher",
            "distill_type",
            "distill_loss_weight",
            "task_loss_weight",
            "distill_temperature",
        ),
        ("search", "retrain", "finetune"),
    ),
}


def check_device(name: str) -> None:
    """Raises VitslimError where a device is none that anything here runs on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise VitslimError(f"--device is auto, cpu, cuda or cuda:N, not {name!r}.")


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
    "finetune": {},
}

# Setting the key cancels an earlier setting of the value.
_INSTEAD_OF = {"batch_size": "global_batch_size", "lr_base": "lr"}


def settings_for(stage: str, given: Mapping[str, Any], recipe: str | None = None) -> Settings:
    """Makes the settings of a stage: defaults, the paper's, the data's own, then what was given.

    Args:
        stage: `dense`, `search`, `retrain` or `finetune`.
        given: What the user chose, by field name.
        recipe: A shipped recipe of defaults under the data's own; of a fine-tuning, `finetune`.
    """
    unknown = sorted(set(given) - set(FIELDS))
    if unknown:
        raise VitslimError(f"Unknown option in {stage}: {', '.join(unknown)}.")
    typed = {}
    for name, value in given.items():
        try:
            typed[name] = read_value(FIELDS[name], value)
        except ValueError as error:
            raise VitslimError(f"Option {name} {error}.") from None
    return Settings(**overlaid(defaults(stage, typed.get("data", Settings.data), recipe), typed))


@cache
def defaults(stage: str, data: str, recipe: str | None = None) -> Mapping[str, Any]:
    """Returns the settings of a stage that differ from those of `Settings`, for some data."""
    under = recipe or ("finetune" if stage == "finetune" else None)
    own: dict[str, Any] = {}
    for name in (under, "digits" if data == "digits" else None):
        if name is not None:
            own = overlaid(own, of_stage(open_recipe(name), stage))
    if under is not None:
        # What a verb wants of one stage stands over what any training on the data wants.
        own = overlaid(own, open_recipe(under).get(stage, {}))
    return PAPER[stage] | {name: read_value(FIELDS[name], value) for name, value in own.items()}


def of_stage(recipe: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns the settings that a recipe has for a stage: those for all, then those for it."""
    shared = {n: v for n, v in recipe.items() if n in FIELDS and belongs(n, stage)}
    return shared | dict(recipe.get(stage, {}))


def overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays choices over earlier ones, and lets go of those whose place they take."""
    gone = {old for new, old in _INSTEAD_OF.items() if over.get(new) is not None}
    if over.get("distill_loss_weight") == 0:
        gone.add("teacher")
    return {name: value for name, value in under.items() if name not in gone} | dict(over)
