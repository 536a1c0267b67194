"""Every slide is found once and named once; what a real folder holds besides is passed over or ends as a failed row."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from wsimil.errors import SlideUnreadableError, UsageError
from wsimil.slides.cohort import find_slides
from wsimil.slides.slide import Slide


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def ids(slides: Path) -> list[str]:
    return [slide.slide_id for slide in find_slides(slides)]


# ---- folders ------------------------------------------------------------------------------------------------------------


def test_slides_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.svs", "b/x.svs", "b/c/x.tiff", "x.ndpi", "a__x.svs")
    assert ids(tmp_path) == ["a_%5Fx", "a__x", "b__c__x", "b__x", "x"]
    assert [slide.name for slide in find_slides(tmp_path)] == ["a__x.svs", "a/x.svs", "b/c/x.tiff", "b/x.svs", "x.ndpi"]


def test_suffixes_go_and_other_dots_stay(tmp_path: Path) -> None:
    touch(tmp_path, "a.ome.tiff", "b.OME.TIF", "TCGA-AA-0001.uuid.SVS", "c.1.png", "notes.txt", "table.xlsx", "d.svs.part", "e")
    assert ids(tmp_path) == ["TCGA-AA-0001.uuid", "a", "b", "c.1"]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "._a.svs", ".cache/b.svs", ".b.tmp-host-1-2.svs")
    assert ids(tmp_path) == ["a"]


def test_slides_in_a_folder_that_was_written_into_are_found_and_pictures_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.svs", "a/y.png", "a/.wsimil-output", "a/overviews/x.png", "b/z.svs")
    assert ids(tmp_path) == ["a__x", "b__z"] and ids(tmp_path / "a") == ["overviews__x", "x", "y"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "slides/a.svs", "slides/deep/b.svs", "elsewhere/c.svs", "elsewhere/more/d.svs")
    (tmp_path / "slides/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "slides/deep/up").symlink_to(tmp_path / "slides")
    (tmp_path / "elsewhere/more/back").symlink_to(tmp_path / "slides")
    (tmp_path / "slides/top").symlink_to(tmp_path)
    # through `far` first; `top` adds nothing that was not seen
    assert ids(tmp_path / "slides") == ["a", "deep__b", "far__c", "far__more__d"]


def test_a_folder_and_a_link_to_it_are_one_and_keep_the_folders_name(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.svs")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert ids(tmp_path) == ["real__a"]


def test_a_link_to_a_slide_is_a_slide(tmp_path: Path) -> None:
    touch(tmp_path, "store/0815.svs")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/case1.svs").symlink_to(tmp_path / "store/0815.svs")
    (tmp_path / "slides/gone.svs").symlink_to(tmp_path / "store/4711.svs")
    assert ids(tmp_path / "slides") == ["case1", "gone"]
    with pytest.raises(SlideUnreadableError, match="no such file"):
        Slide(find_slides(tmp_path / "slides")[1].path)


def test_a_link_to_a_slide_that_is_there_anyway_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "deep/b.svs", ".store/c", ".store/d.svs")
    for link, target in (("twin.svs", "a.svs"), ("deep/twin.svs", "a.svs"), ("c.svs", ".store/c"), ("d.svs", ".store/d.svs")):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert ids(tmp_path) == ["a", "c", "d", "deep__b"]  # what lies hidden is seen by its link alone


def test_two_slides_of_one_id_stop_before_any_work(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.tiff")
    with pytest.raises(UsageError, match=r"a\.svs and .*a\.tiff would both be a; .*slide_id"):
        find_slides(tmp_path)


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    (tmp_path / "x.svs").mkdir()
    for slides in (tmp_path, tmp_path / "x.svs", tmp_path / "missing", tmp_path / "nul\0"):
        with pytest.raises(UsageError, match=r"no such|no slide"):
            find_slides(slides)


def test_one_file_is_a_cohort(tmp_path: Path) -> None:
    touch(tmp_path, "a__b.ome.tiff")
    (slide,) = find_slides(str(tmp_path / "a__b.ome.tiff"))
    assert (slide.slide_id, slide.name, slide.path) == ("a_%5Fb", "a__b.ome.tiff", tmp_path / "a__b.ome.tiff")


def test_names_that_are_no_text_become_text(tmp_path: Path) -> None:
    touch(tmp_path, "%E9.svs", "line\nbreak.svs")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.svs")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    slides = find_slides(tmp_path)
    assert [slide.slide_id for slide in slides] == ["%25E9", "%E9", "line%0Abreak"]
    assert all((slide.slide_id + slide.name).encode().isascii() and slide.path.exists() for slide in slides)


def test_a_folder_that_cannot_be_listed_is_a_row_not_a_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.svs", "closed/b.svs")
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # a test may run as root, whom no mode stops
    slides = find_slides(tmp_path)
    assert [slide.name for slide in slides] == ["a.svs", "closed"]
    with pytest.raises(SlideUnreadableError):
        Slide(slides[1].path)
    with pytest.raises(UsageError, match=r"cannot be listed: Permission denied"):
        find_slides(tmp_path / "closed")


# ---- slides of several files --------------------------------------------------------------------------------------------


def test_companions_are_part_of_the_slide_and_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.mrxs", "a/Data0000.dat", "a/Slidedat.ini", "h/x.jpg", "h/x_macro.jpg", "h/other.jpg", "h/x.opt")
    (tmp_path / "h/x.vms").write_text("[Virtual Microscope Specimen]\nImageFile=x.jpg\nMacroImage=x_macro.jpg\r\nMapFile=x.opt\n")
    assert ids(tmp_path) == ["a", "h__other", "h__x"]
    for slide_id, part, stranger in [("a", "a/Data0000.dat", "b.mrxs"), ("h__x", "h/x_macro.jpg", "h/other.jpg")]:
        slide = next(slide for slide in find_slides(tmp_path) if slide.slide_id == slide_id)
        before = slide.fingerprint()
        (tmp_path / stranger).write_bytes(b"changed")
        assert slide.fingerprint() == before
        (tmp_path / part).write_bytes(b"y")
        assert slide.fingerprint() != before


def test_a_fingerprint_follows_the_content_not_the_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "b.svs")
    a, b = find_slides(tmp_path)
    assert a.fingerprint() == b.fingerprint()
    b.path.write_bytes(b"y")
    assert a.fingerprint() != b.fingerprint()


def dicom(series_uid: str) -> bytes:
    """The head of a DICOM file, with the series of another file mentioned before its own."""

    def element(group: int, number: int, form: bytes, value: bytes, undefined: bool = False) -> bytes:
        value += b"\0" * (len(value) % 2)
        if form in (b"OB", b"SQ"):
            return struct.pack("<HH2sHL", group, number, form, 0, 0xFFFFFFFF if undefined else len(value)) + value
        return struct.pack("<HH2sH", group, number, form, len(value)) + value

    mentioned = element(0x0020, 0x000E, b"UI", b"9.9.9")
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + mentioned + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    closed_item = struct.pack("<HHL", 0xFFFE, 0xE000, len(mentioned)) + mentioned
    end = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return b"".join(
        [
            bytes(128) + b"DICM",
            element(0x0002, 0x0001, b"OB", b"\0\1"),
            element(0x0008, 0x1115, b"SQ", item + end, undefined=True),
            element(0x0008, 0x1140, b"SQ", closed_item),
            element(0x0020, 0x000D, b"UI", b"1.2"),
            element(0x0020, 0x000E, b"UI", series_uid.encode()),
        ]
    )


def test_a_dicom_series_is_one_slide(tmp_path: Path) -> None:
    files = {"case/1.dcm": "1.1", "case/2.DCM": "1.1", "flat/p.dcm": "1.2", "flat/q.dcm": "1.3", "flat/r.dcm": "1.2"}
    touch(tmp_path, *files)
    for name, series in files.items():
        (tmp_path / name).write_bytes(dicom(series))
    touch(tmp_path, "flat/nonsense.dcm", "flat/x.svs")
    slides = find_slides(tmp_path)
    assert [slide.slide_id for slide in slides] == ["case", "flat__nonsense", "flat__p", "flat__q", "flat__x"]
    assert slides[0].path == tmp_path / "case/1.dcm"
    before = [slide.fingerprint() for slide in slides]
    (tmp_path / "flat/r.dcm").write_bytes(dicom("1.2") + b"more")
    assert [i for i, slide in enumerate(slides) if slide.fingerprint() != before[i]] == [2]
    (tmp_path / "table.csv").write_text("slide\ncase\n")
    (by_table,) = find_slides(tmp_path / "table.csv")
    assert (by_table.slide_id, by_table.path) == ("case", tmp_path / "case/1.dcm")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_with_the_name_of_a_slide_is_listed_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening one waits until somebody writes into it: this test would not end."""
    touch(tmp_path, "a.svs", "series/1.dcm")
    pipes = ["p1.dcm", "p2.svs", "p3.vms", "p4.png", "series/2.dcm"]
    for name in pipes:
        os.mkfifo(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.tiff")
        slides = {slide.name: slide for slide in find_slides(tmp_path)}
        assert sorted(slides) == sorted(["a.svs", "series/1.dcm", "s.tiff", *pipes])
        for name in ("s.tiff", *pipes):
            with pytest.raises(OSError, match=r"not a regular file|No such device"):
                slides[name].fingerprint()
            with pytest.raises(SlideUnreadableError):
                Slide(slides[name].path)
        (tmp_path / "table.csv").write_text("slide\np1.dcm\nseries\n")
        assert [slide.path.name for slide in find_slides(tmp_path / "table.csv")] == ["p1.dcm", "1.dcm"]


# ---- tables -------------------------------------------------------------------------------------------------------------


def table(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    (tmp_path / "table.csv").write_bytes(text.encode(encoding))
    return tmp_path / "table.csv"


def test_a_table_names_slides_and_states_their_scale(tmp_path: Path) -> None:
    away = tmp_path / "away"
    touch(away, "z.svs")
    touch(tmp_path, "deep/x.svs", "y.svs")
    lines = [
        "slide,slide_id,mpp,label",
        "deep/x.svs,,0.25,1",
        " y.svs ,Y-1,,0",
        f"{away / 'z.svs'},,0.5,",
        "../gone.svs,,,",
        ",,,",
        "",
    ]
    text = "\r\n".join(lines)
    for encoding in ("utf-8", "utf-8-sig"):  # spreadsheets put a mark in front
        slides = {slide.slide_id: slide for slide in find_slides(table(tmp_path, text, encoding))}
        assert slides.keys() == {"deep__x", "Y-1", "z", "gone"}
        assert [slides[name].mpp for name in ("deep__x", "Y-1", "z")] == [0.25, None, 0.5]
        assert [slides[name].path for name in ("deep__x", "z")] == [tmp_path / "deep/x.svs", away / "z.svs"]
        assert slides["Y-1"].path.exists()
    with pytest.raises(SlideUnreadableError, match="no such file"):  # a row of the run, not its end
        Slide(slides["gone"].path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,mpp\na.svs,0.25\nb.svs,20x\n", r"line 3: mpp is '20x'"),
        ("slide,mpp\na.svs,0.25\nb.svs,0\n", r"line 3: mpp is 0; .*above 0"),
        ("slide,mpp\na.svs,-0.5\n", r"line 2: mpp is -0.5"),
        ("slide,mpp\na.svs,nan\n", r"line 2: mpp is nan"),
        ("slide,mpp\na.svs,0.25\n,0.5\n", r"line 3: the slide is empty"),
        ('slide,mpp\na.svs,"0,25"\n', r"line 2: mpp is '0,25'"),  # could be a thousand somewhere else
        ("slide,mpp\na.svs,0,25\n", r"line 2: more cells than columns"),
        ("slides;mpp\na.svs;0.25\n", r"no column `slide`; did you mean slides\? \(columns: slides, mpp\)"),
        ("", r"no table in it"),
        ("slide,slide_id\na.svs,../a\n", r"line 2: slide_id '../a' cannot be a file name"),
        ("slide,slide_id\na.svs,.a\n", r"cannot be a file name"),
        ("slide\n", r"no slide in it"),
        ("slide\na/x.svs\na/x.svs\n", r"would both be a__x"),
        ("slide\n/a/x.svs\n/b/x.svs\n", r"would both be x; .*slide_id"),
    ],
)
def test_a_table_that_cannot_be_used_says_where(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        find_slides(table(tmp_path, text))


@pytest.mark.parametrize("mpp", ["0.25", "0,25", ".25", ",25"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_spreadsheets_of_other_countries_are_read(mpp: str, separator: str, tmp_path: Path) -> None:
    lines = [("slide", "mpp", ""), ("a, b.svs", mpp, ""), ("c.svs", "", ""), ("", "", "")]
    for name in ("table.csv", "table.tsv"):
        (tmp_path / name).write_text("\n".join(separator.join(line) for line in lines))
        slides = find_slides(tmp_path / name)
        assert [(slide.slide_id, slide.mpp) for slide in slides] == [("a, b", 0.25), ("c", None)]


@pytest.mark.parametrize(
    ("text", "slide_id", "mpp"),
    [
        ("wsi,mpp\na.svs,0.25\n", "a", 0.25),  # TRIDENT, AtlasPatch
        ("wsi\na.svs\n", "a", None),
        ("sample_id,image_path,mask_path,spacing_at_level_0\nS1,a.svs,,0.25\n", "S1", 0.25),  # hs2p
        ("image_path\na.svs\n", "a", None),
        ("slide,wsi,image_path,sample_id,spacing_at_level_0\na.svs,b.svs,c.svs,S1,9\n", "a", None),
        ("wsi,sample_id,spacing_at_level_0\na.svs,S1,9\n", "a", None),
        ("image_path,sample_id,slide_id,spacing_at_level_0,mpp\na.svs,S1,mine,9,0.5\n", "mine", 0.5),
    ],
)
def test_tables_made_for_other_tools_are_read_and_our_names_win(text: str, slide_id: str, mpp: float, tmp_path: Path) -> None:
    (slide,) = find_slides(table(tmp_path, text))
    assert (slide.path, slide.slide_id, slide.mpp) == (tmp_path / "a.svs", slide_id, mpp)


@pytest.mark.parametrize("content", [b"slide\n\xe9.svs\n", "slide\na.svs\n".encode("utf-16"), b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_table_of_another_encoding_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"table\.csv"):
        find_slides(tmp_path / "table.csv")
