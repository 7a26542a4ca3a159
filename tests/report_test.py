"""The report: which folders are runs, what stands in the page's JSON, and that no text breaks out.

tests/report_page_test.py looks at the page in a browser.
"""

import html.parser
import json
import math

import pytest
from conftest import tiny_config

from soup_jax.cli import main
from soup_jax.config import schema
from soup_jax.errors import UserError
from soup_jax.reports import curves, goodput, runs, write
from soup_jax.training import metrics

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&{{script}}"


def data_of(page: str) -> dict:
    """What a browser finds in the page's element `data`."""

    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.inside, self.found, self.tags = "", [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.inside = tag == "script" and dict(attributes).get("id") == "data"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, text):
            if self.inside:
                self.found.append(text)

    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("script") == 2
    assert not {"img", "link", "iframe"} & set(reader.tags)
    return json.loads("".join(reader.found))


def make_run(folder, *, steps=(2, 4, 6), loss=lambda step: 6.0 - step / 10, evaluated=(), **fields):
    """A run's small files, as training writes them."""
    folder.mkdir(parents=True)
    fields.setdefault("num_steps", 6)
    schema.save(tiny_config(**fields), folder / "config.json")
    writer = new_writer(folder)
    before = 0
    for step in steps:
        line = {"steps": step - before, "loss": loss(step), "step_ms": 1800.0, "data_wait_ms": 18.0}
        line |= {"learning_rate": 0.1, "grad_norm": 1.0, "alpha_l1": 2.0}
        writer.write(step, {**line, "tokens_per_second": 100.0, "domains": {"1": [3, 2.5]}})
        before = step
        if step in evaluated:
            writer.write(step, result(cooking=(2.0, 2.5), python=(3.0, 2.9)), kind="evaluation")
    writer.close()
    return folder


def new_writer(folder):
    cfg = tiny_config()
    return metrics.MetricsWriter(cfg, workdir=folder, start_step=0, active=True)


def result(**losses) -> dict:
    """A result of `evaluate`: name -> (specialist, generic_h)."""
    columns = ("specialist", "generic_h")

    def row(pair):
        return {c: {"loss": x, "bits_per_byte": x / 2} for c, x in zip(columns, pair)}

    means = [sum(pair[i] for pair in losses.values()) / len(losses) for i in (0, 1)]
    return {
        "specialists": {name: {"tokens": 10, **row(pair)} for name, pair in losses.items()},
        "average": row(means),
        "generic_validation": {"generic_h": {"loss": 4.0, "bits_per_byte": 2.0}},
    }


def contents(*places) -> dict:
    found = [runs.read(place) for place in runs.find([str(place) for place in places])]
    return data_of(write.page(write.contents(found)))


def curve(found, chart, group=0, series=""):
    (chart,) = [c for c in found["charts"] if c["id"] == chart]
    (one,) = [c for c in chart["curves"] if (c["group"], c["series"]) == (group, series)]
    return one


# What is a run


def test_runs_are_found_by_path_glob_and_in_folders_above_them(tmp_path):
    for name in ("sweep/run-10", "sweep/run-9", "other/deep/run"):
        make_run(tmp_path / name)
    (tmp_path / "sweep" / "table.tsv").write_text("a file beside the runs")
    (tmp_path / "sweep" / "run-9" / "checkpoints").mkdir()
    top = str(tmp_path)
    names = [runs.read(place).name for place in runs.find([top])]
    assert names == ["run", "run-9", "run-10"]
    assert len(runs.find([f"{top}/sweep/*"])) == 2
    again = runs.find([f"{top}/sweep/run-9", f"{top}/sweep", f"{top}/sweep/run-9/"])
    assert [runs.read(place).name for place in again] == ["run-9", "run-10"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("gone", "gone does not exist"),
        ("gone*", "does not exist"),
        ("file", "is a file"),
        ("empty", "is not a run, and none lies below it"),
        ("soup", "is not a run, and none lies below it"),
        ("[ef]*", "none of the 2 places"),
        ("https://b/run", "https://b/run is an address"),
        ("bad\0", "does not exist"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(pattern, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no run")
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "soup")
    (tmp_path / "soup" / "soup.json").write_text("{}")
    with pytest.raises(UserError, match=says.replace("[", "\\[")):
        runs.find([pattern])


def test_runs_of_a_sweep_come_in_the_order_of_their_values(tmp_path):
    for value in ("0.01", "1e+30", "0.003", "2"):
        make_run(tmp_path / f"optimizer.learning_rate={value},seed=0")
    found = [place.rpartition("=")[0].partition("=")[2] for place in runs.find([str(tmp_path)])]
    assert found == ["0.003,seed", "0.01,seed", "2,seed", "1e+30,seed"]


# What the page holds


def test_the_numbers_are_those_of_a_real_run(tiny_run):
    found = contents(tiny_run)
    lines = metrics.read_metrics(tiny_run / "metrics.jsonl")
    loss = curve(found, "loss")
    assert loss["step"] == [line["step"] for line in lines]
    assert loss["mean"] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    seconds = [line["steps"] * line["step_ms"] / 1e3 for line in lines]
    assert loss["hours"][-1] == pytest.approx(sum(seconds) / 3600, rel=1e-5)
    last = lines[-1]
    assert last["tokens"] == last["step"] * found["groups"][0]["tokens_per_step"]

    evaluations = metrics.read_metrics(tiny_run / "metrics.jsonl", kind="evaluation")
    for series in ("specialist", "generic_h"):
        expected = [line["average"][series]["loss"] for line in evaluations]
        assert curve(found, "specialists", series=series)["mean"] == pytest.approx(
            expected, rel=1e-5
        )
    row = {r["name"]: r for r in found["specialists"]["rows"]}["cooking"]
    expected = evaluations[-1]["specialists"]["cooking"]
    assert row["loss"]["specialist"][0] == pytest.approx(expected["specialist"]["loss"], rel=1e-5)
    (source,) = found["specialists"]["sources"]
    assert (source["part"], source["steps"]) == ("tuning", [12])
    assert "newest evaluation during training" in source["file"]

    (corpus,) = found["domains"]
    entries = json.loads((tiny_run / "domains" / "domains.json").read_text())
    assert {r["domain"]: r["label"] for r in corpus["rows"]} == dict(
        enumerate(entry["label"] for entry in entries)
    )
    assert sum(r["share"] for r in corpus["rows"]) == pytest.approx(1, abs=1e-4)
    windows = {row["domain"]: row["windows"] for row in corpus["rows"]}
    (met,) = corpus["met"]
    read = sum(n * windows[row["domain"]] for n, row in zip(met["epochs"], corpus["rows"]))
    assert read == pytest.approx(12 * 16, rel=1e-3)  # all windows of all steps

    (run,) = found["runs"]
    assert run["state"] == "done"
    (start,) = run["starts"]
    assert start["steps"] == [0, 12]
    assert start["end"] == "done"
    assert start["versions"]["jax"]
    assert run["times"]["recorded"]
    assert 0 < run["times"]["goodput"] < 1
    assert {"compiling", "evaluating", "saving"} <= run["times"]["seconds"].keys()


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    (tmp_path / "b" / "config.json").write_text("{")
    found = write.report([str(tmp_path)], out=tmp_path / "out.html")
    assert [run["name"] for run in found["runs"]] == ["a"]
    assert "b/config.json is not valid JSON" in found["unread"][0]
    with pytest.raises(UserError, match="is not valid JSON"):
        write.report([str(tmp_path / "b")], out=tmp_path / "out.html")


def test_a_generic_run_that_was_never_evaluated(generic_run):
    found = contents(generic_run)
    assert found["specialists"]["rows"] == found["alpha"] == []
    assert {c["id"] for c in found["charts"] if c["curves"]} == {
        "loss",
        "learning_rate",
        "grad_norm",
        "speed",
    }


def test_runs_that_differ_in_the_seed_are_one_line_with_a_band(tmp_path):
    for seed in (0, 1, 2):
        make_run(tmp_path / f"a{seed}", seed=seed, loss=lambda step, s=seed: 5.0 + s - step / 10)
    make_run(tmp_path / "b", **{"optimizer.learning_rate": 0.5, "log.every_steps": 1})
    found = contents(tmp_path)
    assert [g["runs"] for g in found["groups"]] == [["a0", "a1", "a2"], ["b"]]
    assert [g["label"] for g in found["groups"]] == ["learning_rate=0.003", "learning_rate=0.5"]
    band = curve(found, "loss")
    assert band["mean"] == pytest.approx([5.8, 5.6, 5.4])
    assert band["low"] == pytest.approx([4.8, 4.6, 4.4])
    assert band["high"] == pytest.approx([6.8, 6.6, 6.4])
    assert band["runs"] == [3, 3, 3]
    assert "low" not in curve(found, "loss", group=1)
    by_name = {row["name"]: row for row in found["configs"]}
    assert by_name["optimizer.learning_rate"]["values"] == ["0.003", "0.5"]
    assert by_name["optimizer.learning_rate"]["differs"]
    assert by_name["seed"]["values"] == ["0, 1, 2", "0"]
    assert "model.remat" not in by_name


def test_labels_name_as_few_fields_as_tell_the_groups_apart(tmp_path):
    generic = {"num_experts": 0, "num_mixtures": 1, "name": "generic"}
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", **generic)
    make_run(tmp_path / "c", **{"optimizer.learning_rate": 0.5, "optimizer.beta1": 0.5})
    make_run(tmp_path / "d")
    (tmp_path / "d" / "changes.jsonl").write_text(
        json.dumps({"step": 4, "field": "optimizer.beta2", "old": 0.9, "new": 0.8}) + "\n"
    )
    labels = [g["label"] for g in contents(tmp_path)["groups"]]
    assert len(set(labels)) == 4
    assert labels[1].startswith("generic")
    assert labels[3].endswith("beta2 from step 4=0.8")
    assert max(label.count("=") for label in labels) == 2


def test_a_corpus_is_named_like_its_folder(tmp_path):
    for name, folder, fingerprint in (("a", "x/one", "1" * 64), ("b", "x/two", "2" * 64)):
        make_run(tmp_path / name, **{"corpus.dir": folder})
        (tmp_path / name / "domains").mkdir()
        (tmp_path / name / "domains" / "map.json").write_text(
            json.dumps({"fingerprint": fingerprint})
        )
        entries = [{"label": "x", "windows": {"train": 1}}] * 6
        (tmp_path / name / "domains" / "domains.json").write_text(json.dumps(entries))
    assert [g["label"] for g in contents(tmp_path)["groups"]] == ["corpus=one", "corpus=two"]
    schema.save(tiny_config(**{"corpus.dir": "y/one", "num_steps": 6}), tmp_path / "b/config.json")
    labels = [g["label"] for g in contents(tmp_path)["groups"]]
    assert labels == ["corpus fingerprint=11111111", "corpus fingerprint=22222222"]


def test_seeds_that_have_not_come_as_far_are_counted(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, steps=(2, 4))
    found = contents(tmp_path)
    assert curve(found, "loss")["runs"] == [2, 2, 1]
    assert [run["state"] for run in found["runs"]] == ["done", "not done"]


def test_a_run_cut_in_a_line_and_a_damaged_line(tmp_path):
    path = make_run(tmp_path / "run", num_steps=8) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"1800.0", b"1900.0") + lines[2] + lines[2][:40])
    found = contents(tmp_path)
    assert curve(found, "loss")["step"] == [2, 6]
    (run,) = found["runs"]
    assert run["problems"][0] == "1 damaged lines of metrics.jsonl are left out"
    assert run["state"] == "not done; a line is being written, or was cut"


def test_numbers_that_are_not_finite_are_shown_as_such(tmp_path):
    make_run(
        tmp_path / "run",
        loss=lambda step: math.nan if step == 4 else math.inf if step == 6 else 5.0,
    )
    evaluation = result(cooking=(2.0, 2.5), python=(3.0, 2.9))
    evaluation["specialists"]["python"]["specialist"]["loss"] = None  # as `evaluate` writes NaN
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    found = contents(tmp_path)
    loss = curve(found, "loss")
    assert (loss["step"], loss["marks"]) == ([2], [4, 6])
    assert found["runs"][0]["loss"] == "Infinity"
    rows = {row["name"]: row for row in found["specialists"]["rows"]}
    assert rows["python"]["loss"]["specialist"] == ["NaN"] * 3
    assert rows["python"]["loss_gain"]["generic_h"] == ["NaN"] * 3
    assert rows["cooking"]["loss_gain"]["generic_h"] == [0.5] * 3


def test_the_evaluation_that_was_used_for_no_choice_comes_first(tmp_path):
    folder = make_run(tmp_path / "run", evaluated=(4, 6))
    final = result(law=(1.0, 1.5))
    final["specialists"]["law"] |= {"alpha": [0.5, -0.25], "h": {"3": 1.0}}
    final |= {"part": "final", "runs": {"specialist": {"step": 4}}, "command": ["soup-jax", "x y"]}
    (folder / "evaluation_tuning.json").write_text(json.dumps(result(law=(9.0, 9.0))))
    assert contents(folder)["specialists"]["sources"][0]["file"] == "evaluation_tuning.json"
    (folder / "evaluation.json").write_text(json.dumps(final))
    found = contents(folder)
    (source,) = found["specialists"]["sources"]
    assert (source["file"], source["steps"], source["older"]) == ("evaluation.json", [4], ["run"])
    assert source["commands"] == ["soup-jax 'x y'"]
    assert found["alpha"] == [{"group": 0, "run": "run", "alpha": {"law": [0.5, -0.25]}}]
    (folder / "evaluation.json").write_text("{")
    found = contents(folder)
    assert found["specialists"]["sources"][0]["file"] == "evaluation_tuning.json"
    assert any("evaluation.json" in text for text in found["runs"][0]["problems"])


def test_columns_of_runs_that_differ_by_seed_are_one(tmp_path):
    for seed in (0, 1):
        folder, found = make_run(tmp_path / f"run{seed}", seed=seed), result(law=(1.0, 1.5))
        found["specialists"]["law"][f"plain-{seed}"] = {"loss": 1.2 + seed, "bits_per_byte": 1.0}
        found["average"][f"plain-{seed}"] = {"loss": 1.2 + seed, "bits_per_byte": 1.0}
        found["runs"] = {"specialist": {"step": 6}, f"plain-{seed}": {"name": "generic", "step": 6}}
        (folder / "evaluation.json").write_text(json.dumps(found))
    found = contents(tmp_path)["specialists"]
    assert found["columns"] == ["specialist", "generic_h", "generic"]
    assert found["rows"][0]["loss_gain"]["generic"] == pytest.approx([0.7, 0.2, 1.2])


def test_texts_of_users_stay_texts(tmp_path):
    folder = make_run(tmp_path / "<b>run", name=EVIL, num_domains=2)
    labels = [{"label": text, "terms": [text], "windows": {"train": 1}} for text in (EVIL, "plain")]
    (folder / "domains").mkdir()
    (folder / "domains" / "domains.json").write_text(json.dumps(labels))
    (folder / "domains" / "map.json").write_text(json.dumps({"fingerprint": "f"}))
    found = write.contents([runs.read(str(folder))], command=["soup-jax", EVIL])
    page = write.page(found)
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    seen = data_of(page)
    assert seen["groups"][0]["label"] == EVIL
    assert EVIL in [row["label"] for row in seen["domains"][0]["rows"]]
    assert seen["runs"][0]["name"] == "<b>run"
    assert EVIL in seen["command"]


def test_a_page_asks_for_nothing_and_stays_small(tmp_path):
    for number in range(4):
        fields = {"optimizer.learning_rate": 0.1 + number, "num_steps": 20_000}
        make_run(tmp_path / f"run{number}", steps=range(10, 20_001, 10), **fields)
    page = write.page(write.contents([runs.read(p) for p in runs.find([str(tmp_path)])]))
    assert len(page) < 250_000
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page


def test_thinning_keeps_the_ends_and_what_stands_out():
    values = [math.sin(i / 50) for i in range(5000)]
    values[1234], values[4321] = 9.0, -9.0
    kept = curves.thinned(values, values, 100)
    assert len(kept) <= 202
    assert {0, 1234, 4321, 4999} <= set(kept)
    assert kept == sorted(kept)
    assert curves.thinned(values[:150], values[:150], 100) == list(range(150))


def test_goodput_of_runs_that_recorded_nothing_is_an_estimate(tmp_path):
    folder = make_run(tmp_path / "run")
    writer = new_writer(folder)
    for step, step_ms in ((2, 50_000.0), (4, 1000.0), (6, 1000.0)):
        writer.write(step, {"steps": 2, "loss": 1.0, "step_ms": step_ms, "data_wait_ms": 100.0})
    writer.close()
    times = goodput.times(runs.read(str(folder)))
    assert not times["recorded"]
    assert times["seconds"]["slow lines"] == pytest.approx(98.0)
    assert times["seconds"]["waiting for data"] == pytest.approx(0.6)
    assert times["total"] == pytest.approx(104.0)
    assert times["goodput"] == pytest.approx(5.4 / 104)


def test_damaged_records_are_told_and_the_rest_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "starts.jsonl").write_bytes(b'{"began": 3}\nnothing\n\xff\n')
    (folder / "changes.jsonl").write_text("[1]\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "new_field": 1, "seal": "x"}))
    found = contents(folder)
    text = " ".join(found["runs"][0]["problems"])
    assert "3 damaged lines of starts.jsonl" in text
    assert "1 damaged lines of changes.jsonl" in text
    assert "new_field" in text
    assert curve(found, "loss")["step"] == [2, 4, 6]


# The command


def test_the_command_writes_the_page_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", steps=())
    monkeypatch.chdir(tmp_path)
    assert main.run(["report", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "report: report.html (2 runs" in out
    assert "b: metrics.jsonl has no line yet" in out
    page = (tmp_path / "report.html").read_text()
    assert data_of(page)["command"] == "soup-jax report a b --out=report.html"
    assert main.run(["report", "--run=a", "--run=b", "--out=two.html"]) == 0
    assert len(data_of((tmp_path / "two.html").read_text())["runs"]) == 2
