"""MedCoSS against a reference written with torch's own parts, in the layout of the authors' file."""

import argparse
import math
import re

import pytest
import torch
from torch import nn

from medtpp import backbones
from medtpp.backbones.medcoss import PUBLISHED
from medtpp.config import BackboneOptions
from medtpp.errors import WeightsError


def load(name, path, image_size=None):
    return backbones.load(BackboneOptions(name=name, weights=str(path)), image_size=image_size)


class ReferenceLayer(nn.Module):
    """A transformer layer with torch's own parts and the names of the authors' file."""

    def __init__(self, width, hidden):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.gamma_1 * self.self_attn(y, y, y, need_weights=False)[0]
        return x + self.gamma_2 * self.linear2(nn.functional.gelu(self.linear1(self.norm2(x))))


class ReferencePositions(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.spatial_pos_embed, self.temporal_pos_embed = nn.Embedding(rows, width), nn.Embedding(8, width)


class Reference(nn.Module):
    """The encoder and the parts of the file that a 2D encoder leaves out."""

    def __init__(self, width=128, hidden=256, depth=2):
        super().__init__()
        self.fused_encoder = nn.Module()
        self.fused_encoder.layers = nn.ModuleList([ReferenceLayer(width, hidden) for _ in range(depth)])
        self.video_embed = nn.Module()
        self.video_embed.embeddings = nn.Conv2d(3, width, 16, 16)
        self.video_embed.embeddings_3D = nn.Conv3d(1, width, 16, 16)
        self.video_embed.embeddings_norm = nn.LayerNorm(width)
        self.video_embed.embeddings_st_pos_2D = ReferencePositions(1024, width)
        self.video_embed.embeddings_st_pos_3D = ReferencePositions(64, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.decoder_embed = nn.Linear(width, 32)
        self.mlm_head = nn.Linear(width, 8)

    def forward(self, images):
        embed = self.video_embed
        patches = embed.embeddings(images).flatten(2).transpose(1, 2)
        table = embed.embeddings_st_pos_2D
        positions = table.spatial_pos_embed.weight[: patches.shape[1]] + table.temporal_pos_embed.weight[:1]
        x = embed.embeddings_norm(patches + positions)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for layer in self.fused_encoder.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def medcoss(tmp_path_factory):
    torch.manual_seed(1)
    reference = Reference().eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # none is zero or one, so that each of them matters
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("medcoss") / "checkpoint-299.pth"
    torch.save({"model": reference.state_dict(), "epoch": 299, "args": argparse.Namespace(mask_ratio=0.75)}, path)
    return reference, path


def test_medcoss_equals_a_reference_of_torchs_own_parts(medcoss):
    reference, path = medcoss
    backbone = load("medcoss_vit_base", path)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(images).tokens, reference(images), atol=1e-5, rtol=1e-5)
    spec = backbone.spec
    assert (spec.family, spec.objective, spec.pooling, spec.prefix) == ("medcoss", "pixels", "mean", 1)
    assert (spec.mean, spec.std, spec.width, spec.depth) == ((0.0,) * 3, (1.0,) * 3, 128, 2)
    assert all(len(backbone.layout.paths(role)) == 2 for role in ("attention.qkv", "mlp.out", "norm.mlp"))


def test_medcoss_drops_masks_and_resamples(medcoss):
    _, path = medcoss
    backbone = load("medcoss_vit_base", path, image_size=96)
    assert backbone.spec.grid == (6, 6)
    images, order = torch.rand(1, 3, 96, 96), torch.randperm(36)[None]
    with torch.no_grad():
        whole, shuffled = backbone.encode(images), backbone.encode(images, keep=order)
        torch.testing.assert_close(shuffled.patches[0], whole.patches[0, order[0]], atol=1e-4, rtol=1e-4)
        masked = backbone.encode(images, mask=torch.ones(1, 36, dtype=torch.bool)).tokens
        other = backbone.encode(1 - images, mask=torch.ones(1, 36, dtype=torch.bool)).tokens
    assert torch.equal(masked, other)
    assert not torch.equal(masked, whole.tokens)


def test_medcoss_positions_are_the_first_196_rows_and_the_first_time(medcoss):
    reference, path = medcoss
    table = reference.video_embed.embeddings_st_pos_2D
    expected = table.spatial_pos_embed.weight[:196] + table.temporal_pos_embed.weight[0]
    assert torch.equal(load("medcoss_vit_base", path).encoder.pos_embed[0], expected)
    assert math.isqrt(len(expected)) == 14


def test_medcoss_needs_its_file(tmp_path):
    with pytest.raises(WeightsError, match=re.escape(PUBLISHED)):
        backbones.load("medcoss_vit_base")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth is no MedCoSS checkpoint"):
        load("medcoss_vit_base", tmp_path / "other.pth")


def test_medcoss_with_a_layer_cut_short(medcoss, tmp_path):
    reference, _ = medcoss
    state = {k: v for k, v in reference.state_dict().items() if k != "fused_encoder.layers.1.linear2.weight"}
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.mlp\.fc2\.weight"):
        load("medcoss_vit_base", tmp_path / "cut.pth")


def test_medcoss_at_random_is_a_vit_base():
    spec = backbones.load("medcoss_vit_base", weights="random").spec
    assert (spec.width, spec.depth, spec.image_size, spec.objective) == (768, 12, (224, 224), "unknown")
