"""starts.jsonl: a line for each start, which stops no run."""

import json

import pytest

from soup_jax import command
from soup_jax.processes.group import Solo
from soup_jax.training import starts


def lines(folder):
    return [json.loads(line) for line in (folder / starts.NAME).read_text().splitlines()]


def test_a_line_for_each_start_says_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/theirs.py", "--key=secret"])
    with starts.Record().kept():
        pass
    assert not (tmp_path / starts.NAME).exists()  # it never began

    killed, group = starts.Record(), Solo()
    with command.carried_out(["train", "--config=a b.py"]):
        killed.begin(tmp_path, group, step=0)
    group.at("training", 7)
    killed.update()
    (line,) = lines(tmp_path)
    assert line["command"] == ["soup-jax", "train", "--config=a b.py"]
    assert (line["first_step"], line["step"], line["end"]) == (0, 7, "")
    assert line["devices"]["count"] == 8
    assert line["versions"]["jax"]
    assert {"starting", "training"} <= line["seconds"].keys()

    def fail():
        record = starts.Record()
        with record.kept():
            record.begin(tmp_path, Solo(), step=7)
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail()
    first, second = lines(tmp_path)
    assert second["command"] == ["theirs.py"]
    assert first == line
    assert (second["first_step"], second["end"]) == (7, "KeyError: 'gone'")

    record = starts.Record()
    with record.kept():
        record.begin(tmp_path, Solo(), step=9)
    assert lines(tmp_path)[2]["end"] == "done"


def test_seconds_are_those_of_phases(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    group = Solo()
    now[0] = 5.0
    group.restart_clock()
    for phase, seconds in (("training", 1.0), ("saving", 2.0), ("training", 4.0), ("end", 8.0)):
        now[0] += seconds
        group.at(phase)
    assert group.seconds == {"starting": 1.0, "training": 2.0 + 8.0, "saving": 4.0}
    now[0] += 16.0
    for _ in range(2):  # asking changes nothing
        assert group.seconds_until_now() == {**group.seconds, "end": 16.0}


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"half": '])
def test_a_damaged_file_is_kept_and_stops_nothing(text, tmp_path):
    (tmp_path / starts.NAME).write_bytes(text)
    record = starts.Record()
    with record.kept():
        record.begin(tmp_path, Solo(), step=0)
    assert (tmp_path / starts.NAME).read_bytes().startswith(text)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / starts.NAME).mkdir()
    record = starts.Record()
    with record.kept():
        record.begin(tmp_path, Solo(), step=0)
        record.update()
