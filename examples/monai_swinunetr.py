"""LoRA on the attention of MONAI's SwinUNETR, primed by one line: medtpp.tpp(model, loader, features="").

The network has random weights and the volumes are made up; of your own, load weights with `network.load_from` or
`load_state_dict`, and give the loader of your training patches.
"""

import torch
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import SwinUNETR
from peft import LoraConfig, get_peft_model

import medtpp
from medtpp.data.phantom import generate


def main(count: int = 16, size: int = 32, tpp_steps: int = 100, epochs: int = 5) -> tuple[float, float]:
    """Train on made-up volumes with and without a lesion; gives the loss of the first and of the last epoch."""
    torch.manual_seed(0)
    phantoms = generate(count, size, dims=3)
    volumes, masks = (torch.from_numpy(values)[:, None].float() for values in (phantoms.images, phantoms.masks))
    cases = [{"image": image / 255, "label": mask} for image, mask in zip(volumes, masks, strict=True)]
    loader = DataLoader(Dataset(cases), batch_size=2, shuffle=True)
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4),
                        window_size=4, norm_name=("group", {"num_groups": 4}))  # fmt: skip
    # All linear layers of attention, and the last convolution, which is new.
    lora = LoraConfig(target_modules=r".*\.attn\.(qkv|proj)", r=4, modules_to_save=["out.conv"])
    model = get_peft_model(network, lora)

    # The added line. features="" goes through the decoder, to full resolution; without it, the encoder alone is run.
    record = medtpp.tpp(model, loader, features="", steps=tpp_steps)
    print(f"TPP by {record.card.pretext['name']}: loss {record.losses[0]:.3f} to {record.losses[-1]:.3f}")

    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in loader:
            loss = criterion(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / len(loader)
        losses.append(total)
    print(f"Fine-tuning: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
