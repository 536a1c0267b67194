"""The page that a new user is asked for: it names what is there, what is wrong, and the way out."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import pytest
from huggingface_hub import constants

from wsimil.doctor import examine
from wsimil.errors import EncoderError


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_page_has_what_a_question_needs():
    page = examine()
    for part in ("python 3", "torch 2", "GPU", "OpenSlide 4", "temporary files: /", "weights cache: ", "GB free", "texture ("):
        assert part in page
    assert "uni2-h" not in page.split("without network")[1].split("(")[0]  # its weights are not in an empty cache


def test_one_encoder_is_described_instead_of_all():
    page = examine("phikon-v2")
    assert "encoder phikon-v2" in page and "hf download owkin/phikon-v2" in page and "without network:" not in page


@pytest.mark.parametrize(("wrong", "near"), [("uni2h", "uni2-h"), ("virchov", "virchow"), ("gigapth", "gigapath")])
def test_a_wrong_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(EncoderError, match=f"did you mean {near}"):
        examine(wrong)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no shared memory folder here")
def test_little_shared_memory_is_said_with_the_way_out(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 0, 64_000_000))
    assert "--shm-size" in examine()


def test_a_cache_that_cannot_be_written_is_said(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written; set HF_HOME" in examine()
