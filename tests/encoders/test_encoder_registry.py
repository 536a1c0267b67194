"""The registry says true and consistent things, without torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from wsimil.encoders import ENCODERS, EncoderContract, describe_encoders, encoder_rows, find_encoder
from wsimil.encoders.registry import TEXTURE
from wsimil.encoders.vit import embedding_dim
from wsimil.encoders.weights import skeleton

UNUSUAL = ["uni", "uni2-h", "virchow2", "gigapath", "hibou-l", "phikon-v2", "ctranspath", "openmidnight", "gpfm"]
"""Those whose network differs from timm's of that name, and one that does not."""


@pytest.mark.parametrize("name", UNUSUAL)
def test_networks_have_the_published_size_and_width(name):
    entry = ENCODERS[name]
    network = skeleton(entry.contract.architecture, entry.model_args)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert entry.params_m is not None and millions == pytest.approx(entry.params_m, abs=0.06 if entry.params_m < 1000 else 0.6)
    assert embedding_dim(name, network, entry.contract.pooling) == entry.contract.dim


def test_every_entry_is_complete():
    for name, entry in ENCODERS.items():
        contract = entry.contract
        assert contract.name == name and contract.sha256 == "" and contract.licence
        assert entry.hub_id.count("/") == 1 and entry.hub_id in contract.source
        assert contract.tile_px and contract.tile_px % 14 * (contract.tile_px % 16) == 0
        assert all(0 < value < 1 for value in contract.mean + contract.std)
        assert not contract.trained_mpps or contract.mpp in contract.trained_mpps


def test_pins_are_whole_commits_and_what_is_not_pinned_says_so():
    rows = {row["name"]: row["revision"] for row in encoder_rows()}
    for name, entry in ENCODERS.items():
        assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision), name
        assert rows[name] == (entry.revision or "main")
    unpinned = sum(entry.revision is None for entry in ENCODERS.values())
    assert describe_encoders().count("main (not pinned)") == unpinned
    assert len({entry.revision for entry in ENCODERS.values() if entry.revision}) == len(ENCODERS) - unpinned  # no copied line


def test_names_and_aliases_lead_to_one_entry_each():
    names = [name for entry in ENCODERS.values() for name in (entry.contract.name, *entry.aliases)]
    for entry in ENCODERS.values():
        for name in (entry.contract.name, *entry.aliases):
            assert find_encoder(name) is find_encoder(name.upper()) is entry
    assert len({entry.contract.folder_name for entry in ENCODERS.values()} | {TEXTURE.folder_name}) == len(ENCODERS) + 1
    assert "texture" not in names and find_encoder("texture") is None


@pytest.mark.parametrize(
    "name", ["uni_v1", "uni_v2", "hoptimus0", "conch_v15", "phikon_v2", "hibou_l", "virchow2", "gigapath", "kaiko-vitb8"]
)
def test_tridents_names_are_understood(name):
    assert find_encoder(name) is not None


def test_the_list_names_every_encoder():
    text = describe_encoders()
    assert all(f"\n{name} " in text for name in ["texture", *ENCODERS])
    assert encoder_rows()[0]["available"] is True


def test_listing_waits_for_nothing_heavy():
    code = (
        "import sys; from wsimil.encoders import describe_encoders; describe_encoders(); print({'torch', 'timm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def contract(**facts) -> EncoderContract:
    return EncoderContract("x", "vit", 8, **facts)


def test_equal_recipes_mean_equal_vectors_so_everything_that_decides_one_is_in_it():
    plain = contract(tile_px=224, sha256="a")
    changed = [
        contract(tile_px=224, sha256="b"),
        contract(tile_px=256, sha256="a"),
        contract(tile_px=224, sha256="a", mean=(0.1, 0.0, 0.0)),
        contract(tile_px=224, sha256="a", std=(0.5, 1.0, 1.0)),
        contract(tile_px=224, sha256="a", pooling="cls"),
        contract(tile_px=224, sha256="a", interpolation="bilinear"),
    ]
    assert all(other.recipe() != plain.recipe() for other in changed)
    renamed = EncoderContract("other name", "vit", 8, tile_px=224, sha256="a", licence="MIT", mpp=0.5, local=True)
    assert renamed.recipe() == plain.recipe()


@pytest.mark.parametrize("name", ["hf-hub:org/model@main", "random:resnet10t:3", "../../etc", "a b/ü", "C:\\weights", "...", ""])
def test_a_folder_name_is_one_safe_part_of_a_path(name):
    folder = EncoderContract(name, "vit", 8).folder_name
    assert folder.startswith("features_") and len(folder) > len("features_")
    assert folder.isascii() and not set(folder) & set("/\\: ") and ".." not in folder


@pytest.mark.parametrize(
    ("mpp", "tile_px", "quiet"),
    [(0.5, 224, True), (0.5, 256, True), (0.25, 224, False), (0.25, 448, True), (1.0, 224, False), (0.5, 512, False)],
)
def test_a_scale_the_network_never_saw_is_remarked(mpp, tile_px, quiet):
    remark = contract(tile_px=224, mpp=0.5).scale_remark(mpp=mpp, tile_px=tile_px)
    assert (remark is None) is quiet
    assert remark is None or ("0.5 µm/px" in remark and "--mpp 0.5 --tile-px 224" in remark)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_no_encoder_remarks_on_the_settings_it_asks_for(name):
    """Nor on the tiles its authors cut: 256 px for an input of 224, 512 px for one of 448."""
    own = ENCODERS[name].contract
    assert own.tile_px is not None
    for mpp in own.trained_mpps or (own.mpp or 0.5,):
        assert own.scale_remark(mpp=mpp, tile_px=own.tile_px) is None
        assert own.scale_remark(mpp=mpp, tile_px=own.tile_px * 8 // 7) is None


def test_scale_is_not_remarked_where_any_is_right_or_none_is_known():
    assert contract(tile_px=224, mpp=0.5, trained_mpps=(0.25, 0.5, 1.0)).scale_remark(mpp=1.0, tile_px=224) is None
    assert contract(tile_px=224).scale_remark(mpp=7.0, tile_px=224) is None
    assert TEXTURE.scale_remark(mpp=0.25, tile_px=50) is None
