"""LoRA on a vision transformer by the Trainer of Hugging Face, primed by one line: medtpp.tpp(model, train).

The network has random weights and the images are made up, so that the script needs no network; of your own, write
ViTForImageClassification.from_pretrained(...) and a data set whose items have "pixel_values" and "labels".
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import medtpp
from medtpp.data.phantom import generate


def main(count: int = 200, size: int = 64, tpp_steps: int = 200, epochs: float = 20) -> tuple[float, float]:
    """Train on made-up radiographs with and without a lesion; gives the loss on them before and after."""
    torch.manual_seed(0)
    phantoms = generate(count, size)
    pixels = torch.from_numpy(phantoms.images)[:, None].float().expand(-1, 3, -1, -1) / 127.5 - 1
    train = [
        {"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, phantoms.labels, strict=True)
    ]
    config = ViTConfig(image_size=size, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                       intermediate_size=256, num_labels=2)  # fmt: skip
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=8, modules_to_save=["classifier"])
    model = get_peft_model(ViTForImageClassification(config), lora)

    record = medtpp.tpp(model, train, steps=tpp_steps)  # the added line; the classifier stays as it is
    print(f"TPP: loss {record.losses[0]:.3f} to {record.losses[-1]:.3f} in {record.steps} steps")

    arguments = TrainingArguments("trainer_lora", num_train_epochs=epochs, per_device_train_batch_size=32,
                                  learning_rate=5e-3, save_strategy="no", report_to="none")  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=train)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"Fine-tuning: loss {before:.3f} to {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
