"""Which rows are a study's, and which files are none."""

import csv

import pytest
from programs import ROOT
from test_sweep import FLAGS, TWO

from settings.errors import ConfigError
from studies.rows import Results, read_rows, write_rows
from studies.study import read_study

ONE = "settings: {epochs: 3, lr: 0.05}\nconditions: {only: {}}\n"


@pytest.fixture
def study(tmp_path):
    """Reads a study."""

    def study(text, *flags):
        (tmp_path / "study.yaml").write_text(text)
        return read_study(str(tmp_path / "study.yaml"), str(tmp_path / "runs"), [*FLAGS, *flags])

    return study


def row(run, **more):
    return {"condition": run.condition, "seed": run.seed, "top1": 50.0, "settings": run.settings_digest, **more}


def test_rows_of_other_settings_are_refused_of_seeds_too_that_the_study_names_no_more(study, tmp_path):
    before = study(TWO)
    write_rows(str(tmp_path / "study.csv"), [row(run) for run in before.runs])
    assert len(Results(study(TWO.replace("[0, 1, 2]", "[5]")), str(tmp_path)).rows) == 6
    with pytest.raises(ConfigError, match="has low, seed 0 with other settings"):
        Results(study(TWO.replace("epochs: 3", "epochs: 4").replace("[0, 1, 2]", "[5]")), str(tmp_path))


def test_a_row_without_the_scores_of_held_out_images_is_unfinished_and_replaced(study, tmp_path):
    (run,) = study(ONE).runs
    write_rows(str(tmp_path / "study.csv"), [row(run)])
    held_out = study(ONE.replace("only: {}", "only: {held_out: test}"))
    results = Results(held_out, str(tmp_path))
    assert results.row(held_out.runs[0]) is None and results.finished() == []
    results.add(held_out.runs[0], row(run, held_out_top1=40.0), [])
    assert [(row["top1"], row["held_out_top1"]) for row in read_rows(str(tmp_path / "study.csv"))] == [(50, 40)]
    assert Results(held_out, str(tmp_path)).finished() == results.rows


def test_scores_of_other_held_out_images_are_never_mixed_in(study, tmp_path):
    (run,) = study(ONE.replace("only: {}", "only: {held_out: test}")).runs
    write_rows(str(tmp_path / "study.csv"), [row(run, held_out="test", held_out_top1=40.0)])
    for split, finished in (("test", 1), ("other", 0)):
        now = study(ONE.replace("only: {}", f"only: {{held_out: {split}}}"))
        assert len(Results(now, str(tmp_path)).finished()) == finished
    write_rows(str(tmp_path / "study.csv"), [row(run, held_out_top1=40.0)])  # of before the column was
    assert len(Results(now, str(tmp_path)).finished()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"condition;seed;top1;settings\nonly;0;50;abc\n",
        b"<<<<<<< HEAD\ncondition,seed,top1,settings\nonly,0,50,abc\n",
        b"condition,seed,top1\nonly,0,50\n",
    ],
)
def test_a_file_without_the_columns_of_rows_is_named(content, study, tmp_path):
    (tmp_path / "study.csv").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"study.csv cannot be read as rows of a study: no column (condition|settings),"
    ):
        Results(study(ONE), str(tmp_path))


def test_a_file_that_a_spreadsheet_has_marked_is_read(study, tmp_path):
    (run,) = study(ONE).runs
    write_rows(str(tmp_path / "study.csv"), [row(run)])
    (tmp_path / "study.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "study.csv").read_bytes())
    assert Results(study(ONE), str(tmp_path)).row(run)["top1"] == 50


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*_means.csv")), ids=lambda path: path.stem)
def test_committed_statistics_are_those_of_their_rows(path, tmp_path, monkeypatch):
    """A row taken out or mended by hand leaves them behind."""
    monkeypatch.chdir(ROOT)
    name = path.stem.removesuffix("_means")
    results = Results(read_study(f"configs/studies/{name}.yaml", str(tmp_path)), str(path.parent))
    results.folder = str(tmp_path)
    results.write_statistics()
    for part in ("means", "differences"):
        ours, theirs = (
            list(csv.DictReader((folder / f"{name}_{part}.csv").open(encoding="utf-8")))
            for folder in (tmp_path, path.parent)
        )
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            for column in one:  # written from rows before they were rounded to six digits
                exact = column in ("column", "condition", "one", "other", "n") or not one[column]
                wanted = one[column] if exact else pytest.approx(float(one[column]), rel=1e-4, abs=0.01)
                assert (other[column] if exact else float(other[column])) == wanted, (one, other)
