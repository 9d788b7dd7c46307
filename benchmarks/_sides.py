"""The same pretext training twice: with medtpp, and with transformers, peft and Trainer by an experienced user."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from _common import Clock, Sizes
from medtpp import backbones
from medtpp.config import PRETEXTS, TUNERS, AugmentOptions, HardwareOptions
from medtpp.data.augment import resolve
from medtpp.data.batches import BatchStream
from medtpp.data.cache import build
from medtpp.data.case import Case
from medtpp.data.preprocess import Preprocessing
from medtpp.seeds import Draws, Seeds
from medtpp.training.loop import Stream
from medtpp.workflow.bench import RATE, Trainee, fixed_batch, pixels

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about itself

SEEDS = Seeds(0)
MEAN, STD = (0.5,) * 3, (0.5,) * 3  # timm's, of the architecture
CROP_MIN = float(resolve(AugmentOptions(), "xray").crop_min)


class Medtpp:
    """LoRA on a timm ViT, trained by `fit`.

    Args:
        sizes: Of everything.
        supervised: Classification in place of MAE, always augmented.
        augment: As the stages do.
    """

    def __init__(self, sizes: Sizes, *, supervised: bool = False, augment: bool = False) -> None:
        self.sizes = sizes
        mae = PRETEXTS.get("mae").Options(
            mask_ratio=sizes.mask_ratio, decoder_depth=sizes.decoder_depth, decoder_width=sizes.decoder_width
        )
        self.trainee = Trainee(
            backbones.load(sizes.architecture, weights="random", image_size=sizes.image_size),
            TUNERS.get("lora").Options(rank=sizes.rank),
            None if supervised else mae,
            augment=augment,
        )
        self.tuned = self.trainee.tuned
        self.head: Any = self.trainee.head

    def train(self, steps: int, clock: Clock, stream: Stream | None = None) -> None:
        """Train from where it is, on one fixed batch unless a stream is given."""
        sizes = self.sizes
        hardware = HardwareOptions.model_validate({"accelerator": sizes.device, "precision": sizes.precision})
        batches = stream or fixed_batch(sizes.batch, sizes.image_size)
        self.trainee.train(hardware, batches, steps, clock.step)

    def from_files(self, files: Sequence[Path], folder: Path) -> BatchStream:
        """Decode the files into a cache in `folder`: grey, as `medtpp` finds them to be."""
        cases = [Case(id=path.name, image=path) for path in files]
        cache = build(cases, Preprocessing(image_size=self.sizes.image_size, channels=1), folder)
        rows = np.array([cache.row[case.id] for case in cases])
        return BatchStream(cache.images, rows, rows, None, self.sizes.batch, SEEDS)


class Transformers:
    """peft's LoRA on `ViTMAEForPreTraining`, trained by `Trainer`."""

    def __init__(self, sizes: Sizes) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        self.sizes = sizes
        config = ViTMAEConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            intermediate_size=4 * sizes.width,
            image_size=sizes.image_size,
            patch_size=sizes.patch,
            decoder_hidden_size=sizes.decoder_width,
            decoder_num_hidden_layers=sizes.decoder_depth,
            decoder_num_attention_heads=sizes.decoder_width // 32,
            decoder_intermediate_size=4 * sizes.decoder_width,
            mask_ratio=sizes.mask_ratio,
            norm_pix_loss=True,
        )
        network: Any = ViTMAEForPreTraining(config)
        linear = [name for name, module in network.vit.named_modules() if isinstance(module, nn.Linear)]
        lora = LoraConfig(r=sizes.rank, lora_alpha=16, target_modules=[f"vit.{name}" for name in linear])
        self.network = network
        self.model: Any = get_peft_model(network, lora)
        for name, parameter in network.decoder.named_parameters():
            parameter.requires_grad_(not name.endswith("pos_embed"))

    def train(
        self,
        steps: int,
        clock: Clock,
        data: torch.utils.data.Dataset[Any] | None = None,
        workers: int = 0,
    ) -> None:
        """Train from where it is, on one fixed batch unless a data set of single images is given."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Stamp(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
                clock.step(state.global_step)

        sizes = self.sizes
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=sizes.batch,
                learning_rate=RATE,
                lr_scheduler_type="cosine",
                max_grad_norm=1.0,
                bf16=sizes.precision == "bf16",
                fp16=sizes.precision == "16",
                use_cpu=sizes.device == "cpu",
                dataloader_num_workers=workers,
                dataloader_persistent_workers=workers > 0,
                dataloader_pin_memory=sizes.device == "cuda",
                remove_unused_columns=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            batch = {"pixel_values": (pixels(sizes.batch, sizes.image_size).float() / 255 - MEAN[0]) / STD[0]}
            fixed = data is None
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=_Count(steps * sizes.batch) if fixed else data,
                data_collator=(lambda rows: batch) if fixed else _stack,  # noqa: ARG005
                callbacks=[Stamp()],
            )
            with contextlib.redirect_stdout(io.StringIO()):  # its last line of figures
                trainer.train()

    def from_files(self, files: Sequence[Path]) -> torch.utils.data.Dataset[Any]:
        """Files to tensors, each time anew, in the loader's workers."""
        return _Files(files, self.sizes.image_size)


class _Count(torch.utils.data.Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class _Files(torch.utils.data.Dataset[Tensor]):
    def __init__(self, files: Sequence[Path], image_size: int) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(CROP_MIN, 1.0), antialias=True),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        tensor: Tensor = self.transform(Image.open(self.files[index]).convert("RGB"))
        return tensor


def _stack(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(rows)}


def check_work(sizes: Sizes) -> dict[str, dict[str, int]]:
    """Counts of both sides' work, read off the networks and one forward pass."""
    ours, theirs = Medtpp(sizes), Transformers(sizes)
    images = pixels(sizes.batch, sizes.image_size)[:1].float() / 255
    first = "blocks.0"
    with _seen(ours.tuned.encoder.get_submodule(first), ours.head.get_submodule(first)) as seen, torch.no_grad():
        ours.head.loss(ours.tuned, images, Draws(torch.zeros(1, dtype=torch.int64)))
    with _seen(theirs.network.vit.layers[0], theirs.network.decoder.decoder_layers[0]) as also_seen, torch.no_grad():
        theirs.model(pixel_values=images)
    trained = [(name, p.numel()) for name, p in theirs.model.named_parameters() if p.requires_grad]
    return {
        "medtpp": {
            "frozen parameters": sum(value.numel() for value in ours.tuned.source_state().values()),
            "target parameters": sum(p.numel() for p in ours.tuned.targets.values()),
            "decoder parameters": sum(p.numel() for p in ours.head.parameters()),
            "tokens in the encoder": seen[0],
            "tokens in the decoder": seen[1],
        },
        "transformers": {
            "frozen parameters": sum(p.numel() for n, p in theirs.network.vit.named_parameters() if "lora_" not in n),
            "target parameters": sum(count for name, count in trained if "lora_" in name),
            "decoder parameters": sum(count for name, count in trained if "lora_" not in name),
            "tokens in the encoder": also_seen[0],
            "tokens in the decoder": also_seen[1],
        },
    }


@contextlib.contextmanager
def _seen(*modules: nn.Module) -> Iterator[list[int]]:
    """Numbers of tokens that go into each module."""
    seen: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()
