"""No patient on two sides, every slide in test once, no side without a class: whatever the cohort."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wsimil.bags.labels import read_labels, slide_ids_of
from wsimil.bags.splits import COLUMNS, check_splits, make_splits, read_splits, splits_hash, write_splits
from wsimil.config import LabelsConfig, SplitConfig
from wsimil.errors import SplitsError
from wsimil.task import Task

BINARY = Task("binary", ("0", "1"))


def table_of(*patients: tuple[str, str]) -> pd.DataFrame:
    """One entry per patient: the labels of the slides, and the site."""
    return pd.DataFrame(
        [
            (f"s{number}-{slide}", f"p{number}", site, label)
            for number, (labels, site) in enumerate(patients)
            for slide, label in enumerate(labels)
        ],
        columns=["slide_id", "patient", "site", "label"],
    )


def cohort(n_positive: int, n_negative: int, *, seed: int = 0, sites: str = "x") -> pd.DataFrame:
    """Patients of one label each, most with few slides and some with many."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(["1"] * n_positive + ["0"] * n_negative)
    return table_of(*((label * int(draw.geometric(0.4)), draw.choice(list(sites))) for label in labels))


def task_of(table: pd.DataFrame) -> Task:
    classes = tuple(sorted(set(table["label"])))
    return Task("binary" if len(classes) == 2 else "multiclass", classes)


def patients_per_fold(splits: pd.DataFrame, table: pd.DataFrame, split: str, column: str) -> dict[str, list[int]]:
    """Value of the column → number of patients that have it on that side, fold by fold."""
    value_of = dict(zip(table["slide_id"], table[column], strict=True))
    cells = zip(splits["fold"], splits["split"], splits["patient"], splits["slide_id"], strict=True)
    seen = {(fold, patient, value_of[slide]) for fold, side, patient, slide in cells if side == split}
    counts = Counter((fold, value) for fold, _, value in seen)
    return {
        value: [counts[fold, value] for fold in sorted(set(splits["fold"]))] for value in sorted(set(table[column]))
    }


def check_cross_validation(splits: pd.DataFrame, table: pd.DataFrame, folds: int) -> None:
    assert list(splits.columns) == COLUMNS
    everyone = sorted(table["slide_id"])
    rows = list(splits.itertuples(index=False))
    assert sorted(row.slide_id for row in rows if row.split == "test") == everyone
    assert {row.fold for row in rows} == set(range(folds))
    for fold in range(folds):
        mine = [row for row in rows if row.fold == fold]
        assert sorted(row.slide_id for row in mine) == everyone
        assert {row.split for row in mine} == {"train", "val", "test"}
        assert len({(row.patient, row.split) for row in mine}) == table["patient"].nunique()


# the labels of a patient's slides: many patients have both, some have many slides
slides = st.text("01", min_size=1, max_size=5) | st.sampled_from(["0", "1", "0" * 12])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(slides, st.sampled_from("xyz")), min_size=4, max_size=40),
    st.integers(2, 6),
    st.sampled_from([0.1, 0.2, 0.34, 0.5, 0.8]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_side_of_every_fold_has_both_classes(patients, folds, val_fraction, use_site, seed):
    table = table_of(*patients)
    counts = [sum(label in labels for labels, _ in patients) for label in "01"]
    assume(all(count >= folds and count - math.ceil(count / folds) >= 2 for count in counts))
    config = SplitConfig(folds=folds, seed=seed, val_fraction=val_fraction, site="site" if use_site else None)
    splits = make_splits(table, BINARY, config)
    check_cross_validation(splits, table, folds)
    for split in ("train", "val", "test"):
        for per_fold in patients_per_fold(splits, table, split, "label").values():
            assert min(per_fold) >= 1
            assert split != "test" or max(per_fold) - min(per_fold) <= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(5, 15), min_size=2, max_size=4), st.integers(2, 5), st.integers(0, 1000))
def test_classes_are_balanced_over_folds_to_the_patient(counts, folds, seed):
    table = table_of(*((label, "x") for label, count in zip("abcd", counts, strict=False) for _ in range(count)))
    splits = make_splits(table, task_of(table), SplitConfig(folds=folds, seed=seed))
    check_cross_validation(splits, table, folds)
    for per_fold in patients_per_fold(splits, table, "test", "label").values():
        assert max(per_fold) - min(per_fold) <= 1
    for split in ("train", "val"):
        assert min(map(min, patients_per_fold(splits, table, split, "label").values())) >= 1
    sizes = splits[splits["split"] == "test"].groupby("fold").size()
    assert sizes.max() - sizes.min() <= 1  # one slide each: remainders of the classes fill one another's gaps


@pytest.mark.parametrize(
    ("n_positive", "n_negative", "folds"), [(8, 8, 4), (50, 50, 5), (5, 11, 5), (9, 51, 5), (3, 3, 3)]
)
@pytest.mark.parametrize("site", [None, "site"])
def test_small_cohorts_keep_both_classes_on_every_side(n_positive, n_negative, folds, site):
    for seed in range(5):
        table = cohort(n_positive, n_negative, seed=seed, sites="xyz")
        splits = make_splits(table, BINARY, SplitConfig(folds=folds, seed=seed, site=site))
        for split in ("train", "val", "test"):
            assert min(map(min, patients_per_fold(splits, table, split, "label").values())) >= 1


def test_the_validation_set_is_the_asked_share_of_the_training_patients():
    for n_patients in (22, 200):
        table = cohort(n_patients, n_patients)
        for val_fraction in (0.1, 0.2, 0.4):
            splits = make_splits(table, BINARY, SplitConfig(folds=2, val_fraction=val_fraction))
            counts = patients_per_fold(splits, table, "val", "label").values()
            assert {count for per_fold in counts for count in per_fold} == {round(n_patients / 2 * val_fraction)}


def test_large_patients_are_spread_over_folds():
    table = table_of(*[("1" * 20, "x")] * 5, *[("1", "x")] * 20, *[("0", "x")] * 25)
    for seed in range(5):
        splits = make_splits(table, BINARY, SplitConfig(seed=seed))
        assert set(splits[splits["split"] == "test"].groupby("fold").size()) == {29}


def test_sites_are_balanced_when_asked():
    for seed in range(20):
        table = cohort(20, 25, seed=seed, sites="xyz")
        table["both"] = table["label"] + table["site"]
        splits = make_splits(table, BINARY, SplitConfig(site="site", seed=seed))
        for per_fold in patients_per_fold(splits, table, "test", "both").values():
            assert max(per_fold) - min(per_fold) <= 1


def test_splits_are_a_function_of_the_seed_and_the_slides():
    table = cohort(12, 20)
    table["site"] = np.random.default_rng(0).choice(list("xy"), len(table))  # some patients were seen at both
    splits = make_splits(table, BINARY, SplitConfig(site="site"))
    for seed in (1, 2):
        assert make_splits(table.sample(frac=1, random_state=seed), BINARY, SplitConfig(site="site")).equals(splits)
    hashes = {splits_hash(make_splits(table, BINARY, SplitConfig(seed=seed))) for seed in range(10)}
    assert len(hashes) == 10


def test_the_seed_counts_when_every_patient_has_another_number_of_slides():
    table = table_of(*(("01"[number % 2] * (1 + number), "x") for number in range(20)))
    partitions = set()
    for seed in range(10):
        splits = make_splits(table, BINARY, SplitConfig(seed=seed))
        tests = splits[splits["split"] == "test"].groupby("fold")["patient"].agg(frozenset)
        partitions.add(frozenset(tests))
    assert len(partitions) == 10


def test_slides_without_a_label_are_in_no_fold():
    table = cohort(8, 8)
    unlabelled = pd.DataFrame([("u", "p0", "x", "")], columns=table.columns)
    splits = make_splits(pd.concat([table, unlabelled]), BINARY, SplitConfig(folds=4))
    assert splits.equals(make_splits(table, BINARY, SplitConfig(folds=4)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.sampled_from("01")), min_size=30, max_size=60), st.integers(0, 99)
)
def test_neither_patient_nor_group_is_on_two_sides(tmp_path_factory, slides, seed):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    # most patients have one hospital, some two
    cells = [(f"s{i}", f"p{who}", f"h{who if where else who + 1}", label) for i, (who, where, label) in enumerate(slides)]
    table = pd.DataFrame(cells, columns=["slide", "patient", "hospital", "label"])
    table.to_csv(path, index=False)
    labels = slide_ids_of(read_labels(path, LabelsConfig(), group="hospital"))
    try:
        splits = make_splits(labels, BINARY, SplitConfig(folds=3, seed=seed, group="hospital"))
    except SplitsError as error:
        assert "group(s)" in str(error) and "groups that share a patient are one" in str(error)
        return
    assert list(splits.columns) == COLUMNS and set(splits["patient"]) == set(table["patient"])
    merged = splits.merge(table[["slide", "hospital"]], left_on="slide_id", right_on="slide")
    for unit in ("patient", "hospital"):
        assert merged.groupby(["fold", unit])["split"].nunique().max() == 1


def test_given_splits_that_part_a_group_are_refused():
    splits = make_splits(cohort(8, 8), BINARY, SplitConfig(folds=4))
    check_splits(splits.assign(group=splits["patient"]))
    with pytest.raises(SplitsError, match="group h is on two sides of fold 0"):
        check_splits(splits.assign(group="h"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(3, 60), st.integers(2, 5), st.integers(0, 1000))
def test_regression_targets_are_balanced_over_folds(n_patients, folds, seed):
    assume(n_patients >= folds and n_patients - math.ceil(n_patients / folds) >= 2)
    values = np.random.default_rng(seed).permutation(n_patients) / 7
    table = table_of(*(("x", "x") for _ in values)).assign(label=values.astype(str))
    splits = make_splits(table, Task("regression"), SplitConfig(folds=folds, seed=seed))
    check_cross_validation(splits, table, folds)
    if n_patients >= 4 * folds:  # then there are quantiles, and each is in every fold
        table["half"] = np.where(values < np.median(values), "low", "high")
        for per_fold in patients_per_fold(splits, table, "test", "half").values():
            assert min(per_fold) >= 1


@pytest.mark.parametrize(
    ("patients", "folds", "words"),
    [
        ([], 5, "0 patient.*add some$"),
        ("0011", 5, "4 patient.s. with a label are too few for 5 folds; use --folds 4"),
        ("0" * 20 + "1" * 4, 5, "4 patient.s. with label '1' are too few for 5 folds; use --folds 4"),
        ("0" * 20 + "11", 5, "with label '1'.*train, val and test need one each: add some, or leave the class out"),
        ("0" * 20 + "111", 2, "with label '1'.*use --folds 3"),
    ],
)
def test_too_few_patients_name_the_class_and_the_way_out(patients, folds, words):
    table = table_of(*((label, "x") for label in patients))
    with pytest.raises(SplitsError, match=words):
        make_splits(table, BINARY, SplitConfig(folds=folds))


def test_many_slides_of_few_patients_are_few_patients():
    table = table_of(*[("0", "x")] * 20, *[("1" * 50, "x")] * 2)
    with pytest.raises(SplitsError, match="2 patient"):
        make_splits(table, BINARY, SplitConfig())


# ---------------------------------------------------------------- files


def given_splits(*rows: str) -> pd.DataFrame:
    """Rows as `fold slide patient split`."""
    cells = [row.split() for row in rows]
    return pd.DataFrame(
        [(int(fold), slide, patient, "x", split) for fold, slide, patient, split in cells], columns=COLUMNS
    )


OFFICIAL = given_splits("0 a P train", "0 b P train", "0 c Q val", "0 d R test")


def test_an_official_split_is_one_fold(tmp_path):
    write_splits(tmp_path / "splits.csv", OFFICIAL)
    assert read_splits(tmp_path / "splits.csv").equals(OFFICIAL)


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (given_splits("0 a P train", "0 b P test", "0 c Q val"), "patient P is on two sides of fold 0"),
        (given_splits("0 a P train", "0 b P val"), "patient P is on two sides of fold 0"),
        (given_splits("0 a P train", "0 a P train", "0 c Q val"), "a stands twice in fold 0"),
        (given_splits("0 a P train", "0 c Q val", "1 a P val", "1 c Q test"), "fold 1 has no train"),
        (given_splits("0 a P train", "0 c Q test"), "fold 0 has no val"),
        (given_splits("0 a P train", "0 c Q valid"), "split 'valid' is unknown"),
        (OFFICIAL.drop(columns="patient"), "no column 'patient'"),
        (OFFICIAL[:0], "no row"),
    ],
)
def test_splits_that_leak_or_lack_a_side_are_refused(tmp_path, splits, words):
    with pytest.raises(SplitsError, match=words):
        check_splits(splits)
    if list(splits.columns) == COLUMNS:
        write_splits(tmp_path / "splits.csv", splits)
        with pytest.raises(SplitsError, match=rf"splits\.csv: .*{words}"):
            read_splits(tmp_path / "splits.csv")


def test_a_slide_may_be_in_test_of_several_folds():
    check_splits(given_splits(*(f"{fold} {row}" for fold in (0, 1) for row in ("a P train", "b Q val", "c R test"))))


def test_what_a_spreadsheet_does_to_splits_is_understood(tmp_path):
    path = tmp_path / "splits.csv"
    lines = ["\ufefffold; slide_id ;split;patient;", "0.0;a;Train;P;", "0;b;train ;P;", "0;c;VAL;;", "0;d;test;R;"]
    lines.append(";;;;")
    path.write_text("\n".join(lines), "utf-8")
    read = read_splits(path)
    assert read["fold"].tolist() == [0, 0, 0, 0]
    assert read["split"].tolist() == ["train", "train", "val", "test"]
    assert read["patient"].tolist() == ["P", "P", "c", "R"]
    assert list(read.columns) == COLUMNS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("fold,slide_id,split\n0,a,train\n", "no column 'patient'"),
        ("fold,slide_id,patients,split\n0,a,P,train\n", "'patient'; did you mean patients"),
        ("fold,slide_id,patient,split\n0,a,P,train\none,b,Q,val\n", "line 3: fold 'one' is not a number"),
        ("fold,slide_id,patient,split\n0.5,a,P,train\n", "line 2: fold '0.5'"),
        ("fold,slide_id,patient,split\n-1,a,P,train\n", "line 2: fold '-1'"),
        ("fold,slide_id,patient,split\n,a,P,train\n", "line 2: fold ''"),
        ("", "no table"),
    ],
)
def test_splits_that_cannot_be_read_name_file_and_line(tmp_path, content, words):
    path = tmp_path / "splits.csv"
    path.write_text(content)
    with pytest.raises(SplitsError, match=rf"splits\.csv.*{words}"):
        read_splits(path)


def test_the_hash_knows_every_cell_and_not_the_order():
    before = splits_hash(OFFICIAL)
    assert splits_hash(OFFICIAL.sample(frac=1, random_state=0)) == before
    assert splits_hash(OFFICIAL[COLUMNS[::-1]]) == before
    assert splits_hash(OFFICIAL[:-1]) != before
    for column in COLUMNS:
        for row in range(len(OFFICIAL)):
            changed = OFFICIAL.astype(object)
            changed.loc[row, column] = "other"
            assert splits_hash(changed) != before
    shifted = [OFFICIAL.assign(patient="p,q", site="r"), OFFICIAL.assign(patient="p", site="q,r")]
    assert splits_hash(shifted[0]) != splits_hash(shifted[1])


def spelled(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.text("ae\u0301\u212bµ,;\"' \t01_%", min_size=1, max_size=6).filter(str.strip), min_size=3, unique_by=spelled))
def test_the_hash_outlives_the_file(tmp_path_factory, names):
    splits = OFFICIAL.iloc[[index % 4 for index in range(len(names))]].assign(slide_id=names, patient=names)
    splits["split"] = (["train", "val"] * len(names))[: len(names)]
    path = tmp_path_factory.mktemp("splits") / "splits.csv"
    write_splits(path, splits)
    assert splits_hash(read_splits(path)) == splits_hash(splits)


# ---------------------------------------------------------------- other tasks


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


def test_survival_is_balanced_on_the_event():
    draw = np.random.default_rng(0)
    event = draw.permutation([True] * 12 + [False] * 33)
    labels = [f"{draw.integers(1, 99)}{'' if one else '+'}" for one in event]
    table = table_of(*(([label], "x") for label in labels))
    splits = make_splits(table, Task("survival"), SplitConfig(folds=4))
    table["label"] = ["event" if one else "censored" for one in event]
    for split in ("train", "val", "test"):
        counts = patients_per_fold(splits, table, split, "label")
        assert all(spread(each) <= 1 for each in counts.values()) and min(counts["event"]) >= 1


def test_each_of_several_labels_is_balanced():
    draw = np.random.default_rng(1)
    rare, common = draw.uniform(size=60) < 0.15, draw.uniform(size=60) < 0.5
    table = table_of(*(([f"rare={int(r)};common={int(c)}"], "x") for r, c in zip(rare, common, strict=True)))
    splits = make_splits(table, Task("multilabel", ("rare", "common")), SplitConfig(folds=4))
    for label, present in (("rare", rare), ("common", common)):
        table["label"] = np.where(present, "yes", "no")
        assert spread(patients_per_fold(splits, table, "test", "label")["yes"]) <= (1 if label == "rare" else 4)


def test_too_few_events_are_refused_and_few_censorings_are_not():
    few = table_of(*(([f"{t}+"], "x") for t in range(20)), (["5"], "x"), (["6"], "x"))
    with pytest.raises(SplitsError, match=r"2 patient.* with label 'event' are too few for 3 folds"):
        make_splits(few, Task("survival"), SplitConfig(folds=3))
    many = table_of(*(([f"{t}"], "x") for t in range(20)), (["5+"], "x"))
    make_splits(many, Task("survival"), SplitConfig(folds=3))


def test_a_rare_grade_is_no_reason_to_refuse():
    table = table_of(*(([grade], "x") for grade in "1" * 9 + "2" * 9 + "3"))
    make_splits(table, Task("ordinal", ("1", "2", "3")), SplitConfig(folds=3))


def test_soft_labels_are_balanced_on_the_likeliest_class():
    soft = [f"a={share};b={1 - share}" for share in (0.9, 0.8, 0.3, 0.1) for _ in range(6)]
    table = table_of(*(([label], "x") for label in soft))
    splits = make_splits(table, Task("binary", ("a", "b")), SplitConfig(folds=3))
    table["label"] = ["ab"[float(label[2:].split(";")[0]) < 0.5] for label in soft]
    assert all(spread(each) == 0 for each in patients_per_fold(splits, table, "test", "label").values())


# ---------------------------------------------------------------- CLAM's files

CLAM = ",train,val,test\n0,a,d,e\n1,b,,f\n2,c,,\n"


def test_splits_of_clam_are_read(tmp_path):
    (tmp_path / "splits_3.csv").write_text(CLAM)
    splits = read_splits(tmp_path / "splits_3.csv")
    assert list(splits.columns) == COLUMNS and set(splits["fold"]) == {3}
    assert dict(zip(splits["slide_id"], splits["split"], strict=True)) == {
        "a": "train", "b": "train", "c": "train", "d": "val", "e": "test", "f": "test",
    }  # fmt: skip
    assert (splits["patient"] == splits["slide_id"]).all()


def test_numbers_that_pandas_made_floats_are_slides_again(tmp_path):
    sides = [["118", "7", "31"], ["40"], ["2.0", "3"]]
    table = pd.concat([pd.Series([118, 7, 31]), pd.Series([40]), pd.Series(["2.0", "3"])], axis=1, keys=["train", "val", "test"])
    table.to_csv(tmp_path / "splits_0.csv")
    assert "40.0" in (tmp_path / "splits_0.csv").read_text()
    splits = read_splits(tmp_path / "splits_0.csv")
    assert [list(splits.loc[splits["split"] == side, "slide_id"]) for side in ("train", "val", "test")] == sides


def test_a_folder_of_clam_is_all_its_folds(tmp_path):
    (tmp_path / "splits_0.csv").write_text(CLAM)
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,e,a,d\n1,f,b,c\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\na,True,False,False\n")
    (tmp_path / "splits_0_descriptor.csv").write_text(",train,val,test\nnormal,3,1,2\n")
    splits = read_splits(tmp_path)
    assert sorted(set(splits["fold"])) == [0, 1] and len(splits) == 12
    written = tmp_path / "ours.csv"
    write_splits(written, splits)
    assert splits_hash(read_splits(written)) == splits_hash(splits)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("splits_0.csv", ",train,val,test\n0,a,a,b\n", "a stands twice in fold 0"),
        ("splits_0.csv", ",train,val,test\n0,a,,b\n", "fold 0 has no val slide"),
        ("splits_0.csv", ",train,val\n0,a,b\n", "no column 'test'"),
        ("splits_0_bool.csv", ",train,val,test\na,True,False,False\n", "take the file without _bool"),
    ],
)
def test_splits_of_clam_that_cannot_be_trusted_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(SplitsError, match=said):
        read_splits(tmp_path / name)


def test_a_folder_without_splits_says_what_it_looked_for(tmp_path):
    with pytest.raises(SplitsError, match=r"no splits_<fold>\.csv"):
        read_splits(tmp_path)


def test_an_official_test_set_is_one_fold_and_only_validation_is_drawn() -> None:
    table = cohort(20, 30)
    numbers = table["patient"].str.removeprefix("p").astype(int)
    table["official"] = np.where(numbers % 3 == 0, "test", "train")
    splits = make_splits(table, BINARY, SplitConfig(folds=5, test="official"))
    assert set(splits["fold"]) == {0}
    merged = splits.merge(table, on="slide_id")
    assert ((merged["split"] == "test") == (merged["official"] == "test")).all()
    assert {"train", "val", "test"} == set(splits["split"])
    for side in ("train", "val"):
        assert set(merged.loc[merged["split"] == side, "label"]) == {"0", "1"}
    other = make_splits(table, BINARY, SplitConfig(folds=5, seed=1, test="official"))
    tests = [set(one.loc[one["split"] == "test", "slide_id"]) for one in (splits, other)]
    assert tests[0] == tests[1] and splits_hash(splits) != splits_hash(other)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["test", "train", "train", "train", "holdout", "test"], "holdout"),
        (["train"] * 6, "no labelled slide is officially test"),
        (["test", "train", "train", "train", "train", "test"], "patient p0 is officially in train and in test"),
    ],
)
def test_an_official_test_set_that_leaks_or_lacks_a_side_is_refused(sides: list[str], message: str) -> None:
    table = table_of(("00", "x"), ("11", "x"), ("01", "x")).assign(official=sides)
    with pytest.raises(SplitsError, match=message):
        make_splits(table, BINARY, SplitConfig(test="official"))
