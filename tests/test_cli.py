"""What users type: answers, exit statuses, and where the words go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from wsimil import cli
from wsimil.cli import COMMANDS, main


def test_help_lists_every_command_in_flow_order(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert COMMANDS[name].example in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["extrakt"], "did you mean extract"),
        (["extract", "x", "--out", "y", "--tile-pz", "3"], "did you mean --tile-px"),
        (["extract", "--out", "y"], "SLIDES"),
        (["extract", "no-such-folder", "--out", "y"], "no-such-folder"),
        (["extract", "x", "--out", "y", "--mpp", "fast"], "mpp is 'fast'"),
        (["extract", "x", "--out", "y", "--shard", "3/2"], "shard"),
        (["tile", "x", "--out", "y", "--overlap-px", "224"], "overlap_px"),
        (["pretrain", "x", "--out", "y", "--shard", "1/2"], "unknown option --shard"),
        (["pretrain", "x", "--out", "y", "--stage-to", "z"], "unknown option --stage-to"),
        (["pretrain", "x", "--out", "y", "--job.stage-gb", "5"], "unknown option --job.stage-gb"),
        (["train", "no-bags", "--labels", "l.csv", "--out", "y"], "no-bags"),
        (["run", "x", "--out", "y"], "--labels"),
    ],
)
def test_wrong_usage_is_named_and_ends_with_2(argv: list[str], said: str, capsys) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out
    assert "Traceback" not in captured.err


def test_underscores_sections_and_yaml_mean_the_same(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.yaml").write_text("tile: {tile_px: 96}\ntrain: {lr: 0.5}\n")
    base = ["extract", "x", "--out", "y", "--print-config"]
    resolved = []
    for flags in (["--tile-px", "96"], ["--tile_px=96"], ["--tile.tile-px", "96"], ["--config", str(tmp_path / "c.yaml")]):
        assert main([*base, *flags]) == 0
        resolved.append(yaml.safe_load(capsys.readouterr().out))
    assert all(one == resolved[0] for one in resolved) and resolved[0]["tile"]["tile_px"] == 96


def test_what_print_config_prints_is_a_config(tmp_path: Path, capsys) -> None:
    assert main(["run", "x", "--labels", "l", "--out", "y", "--folds", "3", "--seed", "7", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text)
    assert main(["run", "x", "--labels", "l", "--out", "y", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["split"]["seed"] == yaml.safe_load(text)["train"]["seed"] == 7


def test_some_slides_failed_ends_with_1_and_names_them_last(slides: Path, tmp_path: Path, capsys) -> None:
    (slides / "bad.svs").write_bytes(b"x")
    assert main(["extract", str(slides), "--out", str(tmp_path / "job"), "--tile-px", "64"]) == 1
    assert "bad" in capsys.readouterr().err.strip().splitlines()[-1]


def test_json_is_the_whole_of_stdout(slides: Path, tmp_path: Path, capsys) -> None:
    assert main(["extract", str(slides), "--out", str(tmp_path / "job"), "--tile-px", "64", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["counts"] == {"done": 2, "empty": 1, "failed": 0, "skipped": 0}


def test_stages_one_by_one(slides: Path, tmp_path: Path, capsys) -> None:
    """tile and extract share their coordinates: the second reads what the first wrote."""
    job = tmp_path / "job"
    assert main(["tile", str(slides), "--out", str(job), "--tile-px", "64", "--quiet"]) == 0
    patches = {path: path.stat().st_mtime_ns for path in job.rglob("*_patches.h5")}
    assert main(["extract", str(slides), "--out", str(job), "--tile-px", "64", "--quiet"]) == 0
    assert len(patches) == 3 and {path: path.stat().st_mtime_ns for path in job.rglob("*_patches.h5")} == patches


def test_the_end_of_a_run_groups_reasons_and_names_what_failed(tmp_path, capsys):
    failed = [f"s{number}: /slides/s{number}.svs: the file is empty" for number in range(30)] + ["odd: no µm/px: pass --slide-mpp"]
    assert cli._ending(failed, status=tmp_path / "status.csv") == 1
    *whys, last = capsys.readouterr().err.splitlines()
    assert whys == ["  30 × the file is empty", "  1 × no µm/px: pass --slide-mpp"]
    assert last == f"31 failed: {', '.join(f's{number}' for number in range(20))} and 11 more (reasons: {tmp_path / 'status.csv'})"
    assert cli._ending([], status=tmp_path / "status.csv") == 0 and not capsys.readouterr().err


def write_predictions(path: Path) -> Path:
    rows = [f"s{number},{'ab'[number % 2]},0.{2 + number},0.{8 - number}" for number in range(4)]
    path.write_text("\n".join(["slide_id,label,prob_a,prob_b", *rows]) + "\n")
    return path


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_evaluating_into_a_file_names_it(out: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    table = write_predictions(tmp_path / "predictions.csv")
    assert main(["evaluate", str(table), "--out", str(tmp_path / out), "--bootstrap", "0"]) == 2
    assert f"{tmp_path / out}: a file of this name" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path: Path, capsys) -> None:
    """As the system says it: no file can grow."""
    resource = pytest.importorskip("resource")
    table = write_predictions(tmp_path / "predictions.csv")
    assert main(["evaluate", str(table), "--out", str(tmp_path / "out"), "--bootstrap", "0"]) == 0  # imports, too, write files
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert main(["evaluate", str(table), "--out", str(tmp_path / "out"), "--bootstrap", "0"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "File too large" in said and str(tmp_path / "out") in said
