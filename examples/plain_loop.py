"""A loop of one's own around a network of one's own, primed by one line: medtpp.tpp(model, images, features=...).

The last block and the head of a small convolutional network are trained. The rest would be pre-trained: here it has
random weights, so that the script needs no files.
"""

import torch
from torch import nn
from torch.nn import functional as F

import medtpp
from medtpp.data.phantom import generate


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Half the resolution."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Three blocks, their mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(1, 16), block(16, 32), block(32, 64))
        self.head = nn.Linear(64, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) to (B, 2)."""
        logits: torch.Tensor = self.head(self.encoder(images).mean((2, 3)))
        return logits


def main(count: int = 200, size: int = 64, tpp_steps: int = 200, steps: int = 100) -> tuple[float, float]:
    """Train on made-up radiographs with and without a lesion; gives the loss of the first and of the last step."""
    torch.manual_seed(0)
    phantoms = generate(count, size)
    images, labels = torch.from_numpy(phantoms.images)[:, None] / 127.5 - 1, torch.from_numpy(phantoms.labels)
    model = Classifier().requires_grad_(False)
    trained = [*model.encoder[-1].requires_grad_(True).parameters(), *model.head.requires_grad_(True).parameters()]

    record = medtpp.tpp(model, images, features="encoder", steps=tpp_steps)  # the added line; the head is left alone
    print(f"TPP by {record.card.pretext['name']}: loss {record.losses[0]:.3f} to {record.losses[-1]:.3f}")

    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"Fine-tuning: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
