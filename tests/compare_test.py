"""The learning-curve picture, with and without evaluations, of one run and of two."""

import json
import pathlib
import shutil

import pytest

from soup_jax.training import learning_curve, metrics


def _copy(run: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    return folder


def _check_picture(path: pathlib.Path) -> None:
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    height, width = pixels.shape[:2]
    assert width > height > 200
    assert pixels[..., :3].std() > 0.01  # something was drawn


@pytest.fixture
def labels(monkeypatch):
    """The labels of all lines drawn, and the texts put on axes."""
    from matplotlib.axes import Axes

    found = {"lines": [], "texts": []}
    plot, text = Axes.plot, Axes.text

    def record_plot(self, x, y, *args, **kwargs):
        found["lines"].append((kwargs["label"], list(x), list(y)))
        return plot(self, x, y, *args, **kwargs)

    def record_text(self, x, y, s, *args, **kwargs):
        found["texts"].append(s)
        return text(self, x, y, s, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", record_plot)
    monkeypatch.setattr(Axes, "text", record_text)
    return found


def test_fixture_has_what_the_pictures_need(tiny_run, generic_run):
    for run, evaluations in ((tiny_run, [8, 12]), (generic_run, [])):
        lines = metrics.read_metrics(run / "metrics.jsonl")
        assert [v["step"] for v in lines] == [4, 8, 12]
        found = metrics.read_metrics(run / "metrics.jsonl", kind="evaluation")
        assert [v["step"] for v in found] == evaluations


def test_picture_of_an_evaluated_run(tiny_run, tmp_path, labels):
    run = _copy(tiny_run, tmp_path / "soup")
    path = learning_curve.draw(run)
    assert path == run / "learning_curve.png"
    _check_picture(path)
    drawn = {label: (x, y) for label, x, y in labels["lines"]}
    assert set(drawn) == {"soup", "soup: specialist", "soup: generic_h", "soup: shared"}
    lines = metrics.read_metrics(run / "metrics.jsonl")
    assert drawn["soup"][1] == [v["loss"] for v in lines]
    # 16 windows of 32 tokens a step
    assert drawn["soup"][0] == [s * 16 * 32 / 1e6 for s in (4, 8, 12)]
    points = metrics.read_metrics(run / "metrics.jsonl", kind="evaluation")
    x, y = drawn["soup: specialist"]
    assert x == [s * 16 * 32 / 1e6 for s in (8, 12)]
    assert y == [p["average"]["specialist"]["loss"] for p in points]
    assert labels["texts"] == []


def test_picture_without_evaluations_says_so(generic_run, tmp_path, labels):
    path = learning_curve.draw(_copy(generic_run, tmp_path / "alone"))
    _check_picture(path)
    assert [label for label, _, _ in labels["lines"]] == ["alone"]
    assert labels["texts"] == ["evaluate.every_steps is 0"]


def test_picture_of_two_runs(tiny_run, generic_run, tmp_path, labels):
    soup = _copy(tiny_run, tmp_path / "soup")
    path = learning_curve.draw(soup, against=[_copy(generic_run, tmp_path / "other")])
    assert path.parent == soup
    _check_picture(path)
    assert {"soup", "other"} < {label for label, _, _ in labels["lines"]}
    assert not (tmp_path / "other" / "learning_curve.png").exists()


def test_a_run_without_experts_has_one_line_where_its_columns_are_one_model(tmp_path, labels):
    losses = {name: {"loss": 4.5} for name in ("specialist", "generic_h", "shared")}
    lines = [
        {"step": 4, "kind": "train", "tokens": 2e6, "loss": 5.0},
        {"step": 4, "kind": "evaluation", "average": losses},
    ]
    run = tmp_path / "generic"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
    learning_curve.draw(run)
    assert labels["lines"] == [("generic", [2.0], [5.0]), ("generic", [2.0], [4.5])]


def test_a_second_picture_replaces_the_first_and_leaves_nothing_else(tiny_run, tmp_path):
    run = _copy(tiny_run, tmp_path / "soup")
    (run / "learning_curve.png").write_bytes(b"old")
    _check_picture(learning_curve.draw(run))
    assert sorted(p.name for p in run.iterdir()) == ["learning_curve.png", "metrics.jsonl"]


def test_a_picture_that_cannot_be_drawn_fails_nothing(tmp_path):
    lines = [{"step": 1, "kind": "train"}, {"step": 2, "kind": "train", "tokens": [], "loss": 1}]
    for line in lines:  # the first has no numbers and is left out, the second has others
        with (tmp_path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        assert learning_curve.drawn(tmp_path).startswith("not drawn: ") == ("tokens" in line)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "learning_curve.png").unlink()
    (tmp_path / "learning_curve.png").mkdir()
    assert learning_curve.drawn(tmp_path).endswith("a folder is where a file belongs")


def test_run_without_metrics_still_gets_a_picture(tmp_path):
    _check_picture(learning_curve.draw(tmp_path))


def test_evaluation_of_a_step_without_a_log_line_is_left_out(tiny_run, tmp_path, labels):
    run = _copy(tiny_run, tmp_path / "soup")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [v for v in lines if (v["kind"], v["step"]) != ("train", 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in kept))
    _check_picture(learning_curve.draw(run))
    drawn = {label: x for label, x, _ in labels["lines"]}
    assert drawn["soup: shared"] == [12 * 16 * 32 / 1e6]
