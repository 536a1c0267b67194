"""The built-in encoder: what a tile shows decides its vector, not how it lies, where it is in a batch or what size it has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsimil.encoders import load_encoder
from wsimil.encoders.texture import TextureEncoder

PINK, PURPLE = (230, 160, 200), (90, 50, 140)


def tissue(px: int, *, n_nuclei: int, seed: int = 0) -> Tensor:
    """uint8 (1, px, px, 3): pink ground with noise, purple discs."""
    random = torch.Generator().manual_seed(seed)
    tile = torch.tensor(PINK).expand(px, px, 3).float()
    rows, columns = torch.meshgrid(torch.arange(px), torch.arange(px), indexing="ij")
    for _ in range(n_nuclei):
        y, x = torch.rand(2, generator=random) * px
        tile = torch.where(((rows - y) ** 2 + (columns - x) ** 2 < 36)[..., None], torch.tensor(PURPLE).float(), tile)
    noise = torch.randn(px, px, 3, generator=random) * 6
    return (tile + noise).clamp(0, 255).to(torch.uint8)[None]


@pytest.mark.parametrize("px", [16, 33, 50, 64, 102])
def test_turning_and_mirroring_change_nothing(px):
    encoder, tile = TextureEncoder(), tissue(px, n_nuclei=4)
    vector = encoder(tile)
    for turns in range(4):
        turned = torch.rot90(tile, turns, (1, 2))
        for version in (turned, turned.flip(1)):
            torch.testing.assert_close(encoder(version.contiguous()), vector, atol=2e-4, rtol=0)


def test_batch_mates_change_nothing():
    encoder = TextureEncoder()
    tiles = torch.cat([tissue(48, n_nuclei=n, seed=n) for n in range(9)])
    alone = torch.cat([encoder(tile[None]) for tile in tiles])
    torch.testing.assert_close(encoder(tiles), alone, atol=1e-6, rtol=1e-6)


def test_a_large_batch_is_the_same_as_its_pieces(monkeypatch):
    encoder, tiles = TextureEncoder(), torch.cat([tissue(32, n_nuclei=n, seed=n) for n in range(5)])
    whole = encoder(tiles)
    monkeypatch.setattr("wsimil.encoders.texture._CHUNK_PX", 2 * 32 * 32)
    torch.testing.assert_close(encoder(tiles), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("px", [2, 3, 8, 17])
@pytest.mark.parametrize("value", [0, 255])
def test_flat_and_tiny_tiles_are_finite(px, value):
    vector = TextureEncoder()(torch.full((2, px, px, 3), value, dtype=torch.uint8))
    assert vector.isfinite().all()


def test_glass_has_no_stain_and_no_edges():
    encoder = TextureEncoder()
    glass, cells = encoder(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)), encoder(tissue(64, n_nuclei=8))
    assert glass.abs().mean() < 0.05 < cells.abs().mean()


def test_more_nuclei_mean_more_haematoxylin():
    vectors = TextureEncoder()(torch.cat([tissue(64, n_nuclei=n) for n in (0, 5, 15)]))
    assert (vectors[:, 0].diff() > 0.02).all()  # the first number is the mean density of haematoxylin


def test_numbers_are_of_order_one_whatever_the_pixels():
    noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8)[None, ..., None].expand(1, 64, 64, 3)
    vectors = TextureEncoder()(torch.cat([noise, checks, tissue(64, n_nuclei=10)]))
    assert vectors.abs().max() < 10


def test_the_version_stands_for_these_numbers():
    # printed by this code when "texture 1" was made; if they change, count the version in registry.TEXTURE up
    vector = TextureEncoder()(tissue(64, n_nuclei=6))[0]
    expected = [0.1032, 0.1394, 0.0000, 0.8971, 0.8022, 0.2871, 0.1486, 0.0000, 0.5407, -0.0000]
    torch.testing.assert_close(vector[::15], torch.tensor(expected), atol=2e-4, rtol=0)


def test_no_tiles_give_no_vectors():
    encoder = load_encoder("texture")
    assert encoder(torch.zeros(0, 64, 64, 3, dtype=torch.uint8)).shape == (0, encoder.contract.dim)


def test_the_contract_tells_the_truth():
    encoder = load_encoder("texture")
    assert encoder(tissue(40, n_nuclei=2)).shape == (1, encoder.contract.dim)
    assert encoder.contract.tile_px is None and encoder.contract.folder_name == "features_texture"
    assert len(encoder.contract.sha256) == 64
