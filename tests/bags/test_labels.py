"""A label table is read as it was meant, or refused with the line, the name and the way out."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pandas as pd
import pytest

from wsimil.bags.labels import infer_task, labels_of_rows, match_labels, match_slides, read_labels, slide_ids_of
from wsimil.config import LabelsConfig
from wsimil.errors import LabelsError
from wsimil.files import slide_id_from_path
from wsimil.task import Task

CONFIG = LabelsConfig()


@pytest.fixture
def table(tmp_path: Path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows(labels: pd.DataFrame) -> list[tuple]:
    return list(labels.itertuples(index=False, name=None))


# ---------------------------------------------------------------- reading

PLAIN = [("a.svs", "P1", "x", "tumour"), ("b.svs", "P2", "y", "normal")]


@pytest.mark.parametrize(
    "content",
    [
        "slide,patient,site,label\na.svs,P1,x,tumour\nb.svs,P2,y,normal\n",
        "\ufeffslide,patient,site,label\na.svs,P1,x,tumour\nb.svs,P2,y,normal",
        "slide;patient;site;label\r\na.svs;P1;x;tumour\r\nb.svs;P2;y;normal\r\n",
        "slide\tpatient\tsite\tlabel\na.svs\tP1\tx\ttumour\nb.svs\tP2\ty\tnormal\n",
        " slide , label,site ,patient\n a.svs,tumour ,x,P1\nb.svs,\u00a0normal,y, P2\n",
        ',slide,patient,site,label,,\n0,"a.svs",P1,x,"tumour",,\n1,b.svs,P2,y,normal,,\n,,,,,,\n\n',
        "label,age,slide,site,patient\ntumour,,a.svs,x,P1\nnormal,51,b.svs,y,P2\n",
        "\ufeffsep=;\r\nslide;patient;site;label\r\na.svs;P1;x;tumour\r\nb.svs;P2;y;normal\r\n",
        'slide;"age, years";patient;site;label\na.svs;51,5;P1;x;tumour\nb.svs;52;P2;y;normal\n',
        "slide;age, years;patient;site;label\na.svs;51,5;P1;x;tumour\nb.svs;52;P2;y;normal\n",
    ],
    ids=["plain", "bom", "semicolons", "tabs", "spaces", "spreadsheet", "order", "stated", "quoted comma", "bare comma"],
)
def test_tables_are_read_however_they_were_saved(table, content):
    labels = read_labels(table(content), CONFIG)
    assert list(labels.columns) == ["slide", "patient", "site", "label"]
    assert rows(labels) == PLAIN


def test_lines_are_counted_from_the_top_of_the_file(table):
    with pytest.raises(LabelsError, match="line 4: more cells than columns"):
        read_labels(table("sep=;\nslide;label\na;x\nb;y;z\n"), CONFIG)


def test_text_with_separators_and_line_breaks_is_one_cell(table):
    labels = read_labels(table('slide,patient,label\n"a, left.svs",P1,"x\ny"\nb,"P ""2""",z\n'), CONFIG)
    assert rows(labels) == [("a, left.svs", "P1", "", "x\ny"), ("b", 'P "2"', "", "z")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04\xff\xfe", "save it as CSV"),
        ("slide,label\n".encode("utf-16"), "save it as CSV"),
        ("", "no table"),
        ("\n , \n", "no table"),
        ("slide,lable\na,1\n", "no column 'label'; did you mean lable"),
        ("Slide,label\na,1\n", "no column 'slide'; did you mean Slide"),
        ("slide label\na 1\n", "no column 'label'"),
        ("slide,label,label\na,1,2\n", "two columns are named 'label'"),
        ("slide,label\na,1\nb,tumour, left\n", "line 3: more cells than columns"),
        ("slide,label\na,1\n\n ,2\n", "line 4: the slide is empty"),
        ('slide,label,note\na,1,x\nb,1,"ulcerated\nc,1,y\nd,2,z\n', "a cell runs over several lines .*quote that is never closed"),
        ('slide,label,note\r\na,1,"x\r\nb,1,"y"\r\n', "a cell runs over several lines"),
    ],
)
def test_tables_that_cannot_be_used_say_why(table, content, words):
    with pytest.raises(LabelsError, match=rf"labels\.csv.*{words}"):
        read_labels(table(content), CONFIG)


def test_no_table_is_an_error_that_names_it(tmp_path):
    with pytest.raises(LabelsError, match=r"absent\.csv.*No such file"):
        read_labels(tmp_path / "absent.csv", CONFIG)


def test_asked_columns_are_used_or_missed(table):
    path = table("slide,case,centre,her2\na,C1,x,0\nb,,y,1\n")
    labels = read_labels(path, LabelsConfig(target="her2"), group="case", site="centre")
    # without a column `patient` the group is the only owner that the table names
    assert rows(labels) == [("a", "C1", "C1", "x", "0"), ("b", "b", "b", "y", "1")]
    for options, column in (({"group": "cases"}, "'cases'; did you mean case"), ({"group": "case", "site": "center"}, "'center'")):
        with pytest.raises(LabelsError, match=column):
            read_labels(path, LabelsConfig(target="her2"), **options)


def test_a_group_is_added_to_the_patient_and_joined_where_one_patient_has_slides_in_two(table):
    path = table("slide,patient,hospital,label\na,P,A,x\nb,P,B,y\nc,Q,B,x\nd,R,C,y\ne,R,,x\nf,S,,y\ng,S,,y\nh,,C,x\n")
    labels = read_labels(path, CONFIG, group="hospital")
    assert labels["patient"].tolist() == ["P", "P", "Q", "R", "R", "S", "S", "h"]
    assert labels["group"].tolist() == ["A+B", "A+B", "A+B", "C", "C", "S", "S", "C"]
    assert "group" not in read_labels(path, CONFIG)


def test_a_slide_without_a_patient_is_its_own(table):
    labels = read_labels(table("slide,patient,label\na,,x\nb,NA,y\nc,P,x\n"), CONFIG)
    assert labels["patient"].tolist() == ["a", "b", "P"]  # not one patient called NA
    assert read_labels(table("slide,label\na,x\n"), CONFIG)["patient"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Pat1", "PAT1"),
        ("7", "7.0"),
        ("7", "007"),
        ("P  1", "P 1"),
        ("P\u00a01", "P 1"),
        ("P1", "P1\u200b"),
        ("Ｐ1", "P1"),
        ("A‐1", "A-1"),
    ],
)
@pytest.mark.parametrize("column", ["patient", "hospital"])
def test_one_patient_spelled_two_ways_is_refused(table, one, other, column):
    path = table(f"slide,{column},label\na,{one},x\nb,{other},y\n")
    with pytest.raises(LabelsError, match=f"in column '{column}' look like one {column}"):
        read_labels(path, CONFIG, group=column)


def test_patients_that_are_two_stay_two(table):
    path = table("slide,patient,label\na,P1,x\nb,P10,y\nc,1.1,x\nd,1.10,y\ne,,x\nf,,y\n")
    assert read_labels(path, CONFIG)["patient"].nunique() == 6
    assert len(read_labels(table("slide,label\na,x\nA,y\n"), CONFIG, group="slide")) == 2


@pytest.mark.parametrize("owner", ["case_submitter_id", "Participant ID", "donor", "MRN", "bcr_patient_uuid"])
def test_an_empty_column_patient_does_not_hide_another_owner(table, owner):
    for header, cells in ((f"slide,{owner},label", ("a,P,x", "b,P,y")), (f"slide,patient,{owner},label", ("a,,P,x", "b,n/a,P,y"))):
        with pytest.raises(LabelsError, match="looks like the patients"):
            read_labels(table("\n".join([header, *cells]) + "\n"), CONFIG)


def test_the_table_of_clam_names_patients_and_slides_in_its_own_way(table):
    path = table("case_id,slide_id,label,site\nP,a,x,1\nP,b,y,2\n")
    assert rows(read_labels(path, CONFIG)) == [("a", "P", "1", "x"), ("b", "P", "2", "y")]


@pytest.mark.parametrize("column", ["Patient", "PATIENT", "patient_id", "case_id", "Case ID", "bcr_patient_barcode"])
def test_a_column_that_looks_like_the_patients_is_not_passed_over(table, column):
    path = table(f"slide,{column},hospital,label\na,P,A,x\nb,P,B,y\n")
    for group in ("patient", "hospital"):
        with pytest.raises(LabelsError, match=f"column '{column}' looks like the patients.*rename it"):
            read_labels(path, CONFIG, group=group)
    assert read_labels(path, CONFIG, group=column)["patient"].tolist() == ["P", "P"]
    assert read_labels(path, CONFIG, group="slide")["patient"].tolist() == ["a", "b"]
    assert read_labels(table("slide,patient,case_id,label\na,P,1,x\n"), CONFIG)["patient"].tolist() == ["P"]


def test_missing_labels_are_empty_and_none_is_a_class(table):
    labels = read_labels(table("slide,label\na,\nb,NA\nc,nan\nd,N/A\ne, null \nf,none\ng,NAB\nh\n"), CONFIG)
    assert labels["label"].tolist() == ["", "", "", "", "", "none", "NAB", ""]


def test_labels_stay_text(table):
    assert read_labels(table("slide,label\n007,007\n1e3,1e3\n"), CONFIG)["slide"].tolist() == ["007", "1e3"]
    assert read_labels(table("slide,label\na,007\nb,010\n"), CONFIG)["label"].tolist() == ["007", "010"]
    assert read_labels(table("slide,label\na,1.0\nb,0.5\n"), CONFIG)["label"].tolist() == ["1.0", "0.5"]


def test_whole_numbers_written_with_a_point_are_whole_numbers(table):
    """What programs make of a column of integers with an empty cell."""
    labels = read_labels(table("slide,label\na,1.0\nb,0.0\nc,\nd,2\n"), CONFIG)["label"]
    assert labels.tolist() == ["1", "0", "", "2"]
    assert infer_task(labels, CONFIG) == Task("multiclass", ("0", "1", "2"))


# ---------------------------------------------------------------- finding slides

PATHS = ["centre 1/A", "centre 2/A", "centre 2/B_1", "C__1", "TCGA-01.x", "D"]
IDS = [slide_id_from_path(PurePosixPath(path)) for path in PATHS]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("D", "D"),
        ("D.svs", "D"),
        ("D.OME.TIFF", "D"),
        ("./D.svs", "D"),
        ("TCGA-01.x.svs", "TCGA-01.x"),
        ("TCGA-01.x", "TCGA-01.x"),
        ("C__1.svs", "C__1"),
        ("C_%5F1", "C__1"),
        ("centre 1__A", "centre 1/A"),
        ("centre 1/A.svs", "centre 1/A"),
        ("centre 2\\A.svs", "centre 2/A"),
        ("B_1.ndpi", "centre 2/B_1"),
        ("/data/elsewhere/B_1.ndpi", "centre 2/B_1"),
        ("C:\\data\\B_1.ndpi", "centre 2/B_1"),
        ("../slides/D.svs", "D"),
    ],
)
def test_slides_are_found_by_id_path_or_unique_file_name(name, path):
    assert match_slides([name], IDS) == [slide_id_from_path(PurePosixPath(path))]


def test_a_file_name_that_two_slides_have_is_no_name():
    with pytest.raises(LabelsError, match=r"'A\.svs' of the table could be centre 1__A, centre 2__A"):
        match_slides(["D", "A.svs"], IDS)


def test_an_accent_is_an_accent_however_a_system_writes_it():
    apart, composed = "Mu\u0308ller", "M\u00fcller"
    for file, said in ((apart, composed), (composed, apart)):
        assert match_slides([f"{said}.svs"], [file, "b"]) == [file]
        assert match_slides([f"{said}/1.svs"], [f"{file}__1", "b"]) == [f"{file}__1"]
        assert match_slides([f"x/{said}.svs"], [file, "b"]) == [file]
    assert match_slides([apart, composed], [apart, composed]) == [apart, composed]


@pytest.mark.parametrize(("name", "slide_id"), [("slides/a.svs", "a"), ("y/a.svs", "z__y__a"), ("z/y/a.svs", "y__a")])
def test_folders_that_agree_as_far_as_they_go_are_one_slides(name, slide_id):
    assert match_slides([name], [slide_id, "b"]) == [slide_id]


@pytest.mark.parametrize(("name", "slide_id"), [("y/a.svs", "x__a"), ("x/y/a.svs", "z__y__a")])
def test_a_folder_that_says_otherwise_is_another_slides(name, slide_id):
    with pytest.raises(LabelsError, match=f"{name!r} of the table is none of"):
        match_slides([name], [slide_id, "b"])


def test_an_id_beats_a_file_name():
    assert match_slides(["A"], ["A", "x__A"]) == ["A"]


def test_unknown_slides_are_counted_and_the_nearest_is_named():
    with pytest.raises(LabelsError, match=r"'TCGA-02.x.svs' \(and 1 more\).*none of the 6.*did you mean TCGA-01.x"):
        match_slides(["D", "TCGA-02.x.svs", "Z"], IDS)


def labelled(*given: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(given, columns=["slide", "patient", "label"]).assign(site="")


def test_the_same_said_twice_is_one_row():
    matched = match_labels(labelled(("b", "P", "x"), ("a.svs", "P", "x"), ("a", "P", "x")), ["a", "b", "c"])
    assert matched["slide_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize(("other", "words"), [(("a.svs", "P", "y"), "label 'x' and 'y'"), (("a", "Q", "x"), "patient 'P' and 'Q'")])
def test_two_things_said_of_one_slide_are_an_error(other, words):
    with pytest.raises(LabelsError, match=f"two things of a: {words}"):
        match_labels(labelled(("b", "P", "x"), ("a", "P", "x"), other), ["a", "b"])


@pytest.mark.parametrize("name", ["D.svs", "centre 1/A.svs", "centre 1__A", "C__1.svs", "C_%5F1", "/data/B_1.svs"])
def test_ids_made_without_slides_are_found_when_there_are_slides(name):
    made = slide_ids_of(labelled((name, "P", "x")))["slide_id"].tolist()
    assert match_slides(made, IDS) == match_slides([name], IDS)


# ---------------------------------------------------------------- what kind of task


def labels_of(*values: str) -> pd.Series:
    return pd.Series([*values, "", *values])


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (("1", "0"), Task("binary", ("0", "1"))),
        (("10", "2"), Task("binary", ("2", "10"))),
        (("tumour", "normal"), Task("binary", ("normal", "tumour"))),
        (("0.5", "1.5"), Task("binary", ("0.5", "1.5"))),
        (("c", "a", "b"), Task("multiclass", ("a", "b", "c"))),
        (("10", "9", "0", "2"), Task("multiclass", ("0", "2", "9", "10"))),
        (("3_4", "4_3", "4_4"), Task("multiclass", ("3_4", "4_3", "4_4"))),
        (("1e", "nano", "infinity"), Task("multiclass", ("1e", "infinity", "nano"))),
        (("0.5", "1", "-2.25"), Task("regression")),
        (("1e-3", "2e-3", "3"), Task("regression")),
    ],
)
def test_the_values_say_the_task(values, task):
    assert infer_task(labels_of(*values), CONFIG) == task


@pytest.mark.parametrize(
    ("values", "config", "task"),
    [
        (("a", "b"), LabelsConfig(positive="a"), Task("binary", ("b", "a"))),
        (("a", "b"), LabelsConfig(task="multiclass"), Task("multiclass", ("a", "b"))),
        (("0", "1"), LabelsConfig(task="regression"), Task("regression")),
        (("1", "900", "-5"), LabelsConfig(task="regression"), Task("regression")),
        (("1", "900", "-5"), LabelsConfig(task="multiclass"), Task("multiclass", ("-5", "1", "900"))),
    ],
)
def test_what_was_asked_beats_what_the_values_say(values, config, task):
    assert infer_task(labels_of(*values), config) == task


@pytest.mark.parametrize(
    ("values", "config", "words"),
    [
        ((), CONFIG, "0 value"),
        (("a",), CONFIG, "1 value"),
        (tuple(map(str, range(21))), CONFIG, "21 values such as 0  1  2  3: classes or quantities.*--task"),
        (("0", "1", "101"), CONFIG, "--task"),
        (("0", "1", "unknown"), CONFIG, "--task"),
        (("0,5", "1,5", "2,25"), CONFIG, "decimal point"),
        (("0,5", "1,5", "3"), CONFIG, "decimal point"),
        (("0.5", "inf", "1"), LabelsConfig(task="regression"), "'inf' is not a number"),
        (("0.5", "3_4", "1"), LabelsConfig(task="regression"), "'3_4' is not a number"),
        (("0.5", "high"), LabelsConfig(task="regression"), "'high' is not a number"),
        (("a", "b", "c"), LabelsConfig(task="binary"), "not binary"),
        (("a", "b"), LabelsConfig(positive="A"), r"'A' is not a value of 'label' \(a, b\)"),
        (("a", "b", "c"), LabelsConfig(positive="a"), "--positive is for two classes; column 'label' is multiclass"),
        (("0.5", "1.5", "2.5"), LabelsConfig(positive="0.5"), "--positive is for two classes; column 'label' is regression"),
        (("a=1;b=0", "a=0;b=1"), LabelsConfig(order=("b", "a")), "--order is for grades; column 'label' is multilabel"),
        (("12", "5+"), LabelsConfig(time="months", event="dead", positive="1"), "column 'months dead' is survival"),
        (("Tumour", "tumour", "normal"), CONFIG, "'Tumour' and 'tumour' look like one class"),
        (("lobular  type", "lobular type"), CONFIG, "look like one class"),
        (("7", "007", "1"), CONFIG, "'007' and '7' look like one class"),
    ],
)
def test_values_that_could_be_several_things_are_asked_about(values, config, words):
    with pytest.raises(LabelsError, match=words):
        infer_task(labels_of(*values), config)


# ---------------------------------------------------------------- several labels, survival, grades, proportions


def test_several_columns_are_a_label_each_and_a_gap_is_not_known(table):
    path = table("slide,ER,HER2,PR\na,1,0,\nb,NA,TRUE,0.0\nc,,,\n")
    config = LabelsConfig(target=("ER", "HER2", "PR"))
    labels = read_labels(path, config)
    assert labels["label"].tolist() == ["ER=1;HER2=0", "HER2=1;PR=0", ""]
    assert infer_task(labels["label"], config) == Task("multilabel", ("ER", "HER2", "PR"))


def test_a_label_that_nobody_has_keeps_its_place(table):
    config = LabelsConfig(target=("ER", "Ki67"))
    labels = read_labels(table("slide,ER,Ki67\na,1,\nb,0,\n"), config)
    assert infer_task(labels["label"], config).classes == ("ER", "Ki67")


def test_names_in_one_cell_are_several_labels(table):
    labels = read_labels(table("slide,label\na,immune; stroma\nb,none\nc,\nd,stroma\n"), CONFIG)
    assert labels["label"].tolist() == ["immune=1;stroma=1", "immune=0;stroma=0", "", "immune=0;stroma=1"]
    assert infer_task(labels["label"], CONFIG) == Task("multilabel", ("immune", "stroma"))


def test_a_class_called_none_is_a_class_where_there_is_no_list(table):
    labels = read_labels(table("slide,label\na,none\nb,tumour\n"), CONFIG)
    assert infer_task(labels["label"], CONFIG).classes == ("none", "tumour")


def test_probabilities_of_classes_are_soft_labels(table):
    path = table("slide,low,high\na,0.25,0.75\nb,1,\nc,,\n")
    for task in ("binary", "multiclass"):
        config = LabelsConfig(target=("low", "high"), task=task)
        labels = read_labels(path, config)
        assert labels["label"].tolist() == ["low=0.25;high=0.75", "low=1;high=0", ""]
        assert infer_task(labels["label"], config) == Task(task, ("low", "high"))
    positive = LabelsConfig(target=("low", "high"), task="binary", positive="low")
    assert infer_task(labels["label"], positive).classes == ("high", "low")


def test_survival_is_a_time_and_whether_it_happened(table):
    config = LabelsConfig(time="months", event="died")
    labels = read_labels(table("slide,months,died\na,12.5,1\nb,7,no\nc,3,\nd,,1\ne,0.5,True\n"), config)
    assert labels["label"].tolist() == ["12.5", "7+", "", "", "0.5"]
    task = infer_task(labels["label"], config)
    assert task.kind == "survival" and task.horizons[0] > 0.5 and task.horizons[-1] < 12.5


@pytest.mark.parametrize(
    ("content", "config", "said"),
    [
        ("slide,a,b\nx,1,2\n", LabelsConfig(target=("a", "b")), r"line 2: b is '2'; several targets are labels of 0 or 1"),
        ("slide,a,b\nx,.5,.6\n", LabelsConfig(target=("a", "b"), task="multiclass"), r"line 2: .* add up to 1\.1, not 1"),
        ("slide,a,b\nx,-1,2\n", LabelsConfig(target=("a", "b"), task="multiclass"), r"line 2: a is '-1'; expected a probability"),
        ("slide,a=b,c\nx,1,0\n", LabelsConfig(target=("a=b", "c")), "'a=b' cannot be a label"),
        ("slide,a,b\nx,1,0\n", LabelsConfig(target=("a", "b"), task="regression"), "regression task has one target column, not 2"),
        ("slide,a\nx,1\n", LabelsConfig(target=("a", "bb")), "no column 'bb'"),
        ("slide,t,e\nx,soon,1\n", LabelsConfig(time="t", event="e"), "line 2: time is 'soon'; expected a number"),
        ("slide,t,e\nx,-3,1\n", LabelsConfig(time="t", event="e"), "line 2: time is '-3'"),
        ("slide,t,e\nx,3,dead\n", LabelsConfig(time="t", event="e"), r"line 2: event is 'dead'; expected 0 \(censored\) or 1"),
        ("slide,t\nx,3\n", LabelsConfig(time="t", event="e"), "no column 'e'"),
        ("slide,label\nx,3\n", LabelsConfig(task="survival"), "pass --time and --event"),
        ("slide,t,Censorship\nx,3,1\n", LabelsConfig(time="t", event="Censorship"), "1 must mean that the event happened"),
    ],
)
def test_tables_of_several_columns_are_refused_by_name(table, content, config, said):
    with pytest.raises(LabelsError, match=said):
        read_labels(table(content), config)


@pytest.mark.parametrize(
    ("values", "config", "task"),
    [
        (("2", "10", "1"), LabelsConfig(task="ordinal"), Task("ordinal", ("1", "2", "10"))),
        (("low", "high"), LabelsConfig(order=("low", "mid", "high")), Task("ordinal", ("low", "mid", "high"))),
        (("0.1", "0.9", ""), LabelsConfig(task="proportion"), Task("proportion")),
        (("10", "35", "0"), LabelsConfig(task="proportion"), Task("proportion", scale=100.0)),
        (("a;b", "a"), LabelsConfig(task="multiclass"), Task("multiclass", ("a", "a;b"))),
    ],
)
def test_tasks_that_must_be_asked_for(values, config, task):
    assert infer_task(values, config) == task


@pytest.mark.parametrize(
    ("values", "config", "said"),
    [
        (("low", "high"), LabelsConfig(task="ordinal"), "say which is lower: --order high low"),
        (("low", "high"), LabelsConfig(order=("low", "top")), "--order lacks 'high'"),
        (("low", "high"), LabelsConfig(order=("low", "high", "low")), "--order has 'low' twice"),
        (("0.5", "130"), LabelsConfig(task="proportion"), "runs from 0.5 to 130"),
        (("3+", "4+"), LabelsConfig(time="t", event="e"), "no slide has an event"),
        (("a=1;b=0;c=0",), LabelsConfig(target=("a", "b", "c"), task="binary"), "3 targets are not two classes"),
    ],
)
def test_tasks_that_cannot_be(values, config, said):
    with pytest.raises(LabelsError, match=said):
        infer_task(values, config)


# ---------------------------------------------------------------- predictions


def predicted(*given: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(given, columns=["slide", "slide_id", "patient"])


def test_labels_of_slides_that_were_not_predicted_are_passed_over(table):
    labels = read_labels(table("slide,label\nx/a.svs,1\ny/a.svs,0\n/mnt/b.svs,1\nc,0\n"), CONFIG)
    found, others = labels_of_rows(labels, predicted(("x/a.svs", "x__a", "x/a.svs"), ("b.svs", "b", "b"), ("d.svs", "d", "d")))
    assert rows(found[["slide_id", "label"]]) == [("b", "1"), ("x__a", "1")] and others == 2


def test_rows_of_pooled_slides_have_the_label_of_their_patient(table):
    content = "slide,patient,label\na,P1,\nb,P1,1\nc,P2,0\nd,P3,1\ne,P3,0\nf,f,0\ng,f,\n"
    labels = read_labels(table(content), CONFIG)
    given = [("a;b", "P1", "P1"), ("c", "P2", "P2"), ("f;g", "f", "f"), ("h", "h", "h")]
    found, others = labels_of_rows(labels, predicted(*given))
    assert sorted(rows(found)) == [("P1", "P1", "1"), ("P2", "P2", "0"), ("f", "f", "0")] and others == 2
    with pytest.raises(LabelsError, match="patient P3: labels '1' and '0'"):
        labels_of_rows(labels, predicted(("d;e", "P3", "P3")))
    found, _ = labels_of_rows(labels, predicted(("d", "d", "P3"), ("e", "e", "P3")))  # slides, whose labels may differ
    assert rows(found) == [("d", "P3", "1"), ("e", "P3", "0")]
    with pytest.raises(LabelsError, match=r"slide 'a' .*none of the 1 slides"):
        labels_of_rows(labels, predicted(("z", "z", "z")))


def test_accents_are_one_name_however_they_are_typed(table):
    composed, split = "Jos\u00e9", "Jose\u0301"
    labels = read_labels(table(f"slide,patient,label\na,{composed},caf\u00e9\nb,{split},cafe\u0301\n"), CONFIG)
    assert set(labels["patient"]) == {composed} and labels["label"].nunique() == 1
    alone = read_labels(table(f"slide,label\n{split},x\n"), CONFIG)
    assert (alone["slide"].item(), alone["patient"].item()) == (split, composed)


def test_patients_that_a_table_does_not_name_may_be_left_to_others(table):
    path = table("slide,patient,label\na,P1,x\nb,,y\n")
    assert read_labels(path, CONFIG)["patient"].tolist() == ["P1", "b"]
    assert read_labels(path, CONFIG, named_only=True)["patient"].tolist() == ["P1", ""]
    assert read_labels(table("slide,label\na,x\n"), CONFIG, named_only=True)["patient"].tolist() == [""]


def test_a_column_of_several_labels_knows_those_it_is_told_of(table):
    config = LabelsConfig(task="multilabel")
    labels = read_labels(table("slide,label\na,A\nb,B\n"), config, names=("A", "C"))
    assert labels["label"].tolist() == ["A=1;B=0;C=0", "A=0;B=1;C=0"]


def test_a_semicolon_in_the_name_of_a_slide_makes_no_patient_of_it(table):
    labels = read_labels(table("slide,label\ns;1,1\nx/s;2.svs,0\ns3,0\n"), CONFIG)
    given = [("s;1", "s;1", "s;1"), ("x/s;2.svs", "x__s;2", "x__s;2"), ("s3", "s3", "s3")]
    found, others = labels_of_rows(labels, predicted(*given))
    assert rows(found[["slide_id", "label"]]) == [("s3", "0"), ("s;1", "1"), ("x__s;2", "0")] and others == 0
