"""The time to bits/dim is that of what was recorded, and says what it is."""
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pixelaux
from pixelaux import main

HERE = pathlib.Path(__file__).resolve().parents[1]
speedrun = pixelaux.tool("speedrun")
NAME = "held_out_bits_per_dim"


def recorded(out, bits, seconds, **fields):
    """A run's folder, in which each factor has these measurements, at equal distances."""
    out.mkdir(exist_ok=True)
    steps = tuple(100 * len(measured) for measured in bits)
    config = pixelaux.make_config(
        "tiny", model="pyramid", size=(16, 16), hold_out=7, **{"steps": steps, **fields})
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    lines = []
    for k in range(len(bits)):
        for i, (bit, second) in enumerate(zip(bits[k], seconds[k])):
            lines.append(dict(factor=k, step=100 * i + 50, bits_per_dim=9.0, seconds=second / 2))
            lines.append({"factor": k, "step": 100 * i + 100, "seconds": second, NAME: bit})
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return out


def test_factors_add_up_as_if_they_were_trained_in_turns(tmp_path, capsys):
    """By hand: two factors of three measurements. The test set's bits come from eval."""
    out = recorded(tmp_path / "run", [[2.5, 1.0, 0.9], [2.0, 2.6, 2.45]], [[1, 2, 3], [10, 20, 40]])
    assert main(["speedrun", str(out)]) == 0
    text = capsys.readouterr().out
    rows = dict(re.findall(r"^\| ([0-9.]+) \| ([\w ,]+) \|$", text, re.M))
    assert rows["4.5"] == "11" and rows["4.0"] == rows["3.7"] == "22"
    assert rows["3.4"] == "43" and rows["3.32"] == "not reached"
    assert "| at the end: 3.3500 | 43 |" in text and "7 images held out" in text
    assert "test image" not in text and text == (out / "speedrun.md").read_text()
    with Image.open(out / "speedrun.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    (out / "eval-9.json").write_text(json.dumps(dict(images=9, bound=4.25, exact=3.5)))
    (out / "eval.json").write_text(json.dumps(dict(images=10, bound=4.125, exact=3.375)))
    assert main(["speedrun", str(out)]) == 0
    assert "10 test images: bound <= 4.1250, exact 3.3750" in capsys.readouterr().out


def test_a_factor_of_few_measurements_counts_with_its_last_one(tmp_path):
    """Before its first one there is no total."""
    out = recorded(tmp_path / "run", [[3.0, 1.0], [2.0] * 5], [[10, 20], [1, 2, 3, 4, 5]])
    seconds, bits = speedrun.totals(out)
    assert bits == [5.0] * 10 + [3.0] and seconds[0] == 12 and seconds[-3:] == [14, 14, 25]


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.floats(2, 6), min_size=1, max_size=9), target=st.floats(2, 6))
def test_the_time_is_the_first_at_which_the_target_was_met(bits, target):
    """By a slow formula; never, if none is that low."""
    seconds = [3.0 * i + 1 for i in range(len(bits))]
    met = [second for second, bit in zip(seconds, bits) if bit <= target]
    assert speedrun.time_to(target, seconds, bits) == (min(met) if met else None)


@pytest.mark.parametrize("fault, told", [
    ("no metrics", "metrics.jsonl"), ("none held out", "--hold-out"), ("one short", "--resume"),
    ("no config", "config.json")])
def test_what_is_no_such_run_is_told(tmp_path, capsys, fault, told):
    """In one line, exit status 2."""
    second = [] if fault == "one short" else [3.0, 2.0]
    out = recorded(tmp_path / "run", [[3.0, 2.0], second], [[1, 2], [1, 2]], steps=(200, 200))
    if fault == "no metrics":
        (out / "metrics.jsonl").unlink()
    if fault == "no config":
        (out / "config.json").unlink()
    if fault == "none held out":
        text = (out / "metrics.jsonl").read_text()
        (out / "metrics.jsonl").write_text(text.replace(NAME, "test_bits_per_dim"))
    assert main(["speedrun", str(out)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_commit_is_that_of_the_clone(monkeypatch, tmp_path):
    """What git says, with a + if the code was changed since; without a clone what COMMIT says."""
    told = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
    monkeypatch.setenv("COMMIT", "abc")
    found = pixelaux.commit()
    assert found == "abc" or told.stdout.startswith(found.rstrip("+"))
    monkeypatch.setattr(pixelaux, "__file__", str(tmp_path / "pixelaux.py"))
    assert pixelaux.commit() == "abc"
    monkeypatch.delenv("COMMIT")
    assert pixelaux.commit() == "unknown"


def test_a_torn_line_of_the_commands_is_left_out(tmp_path):
    """What a kill has cut. The others are told, with versions and commit."""
    out = recorded(tmp_path / "run", [[3.0], [2.0]], [[1], [2]])
    line = dict(command="pixelaux.py train", processes=1, hardware="a card", torch="2.11",
                cuda="13.0", python="3.12", commit="abc")
    (out / "commands.jsonl").write_text('{"command": "pixel\n' + json.dumps(line) + "\n")
    assert speedrun.head(out)[1:] == [
        "`pixelaux.py train` (1 x a card, torch 2.11, cuda 13.0, python 3.12, commit abc)"]


def test_what_is_not_finished_has_the_times_so_far(tmp_path):
    """Up to the twentieth that all factors have reached. Control: the finished one has more."""
    bits = [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]
    out = recorded(tmp_path / "run", bits, [[1, 2, 3, 4], [1, 2, 3, 4]])
    assert speedrun.totals(out)[1][-1] == 2.0
    cut = [bits[0], bits[1][:2]]
    out = recorded(tmp_path / "cut", cut, [[1, 2, 3, 4], [1, 2]], steps=(400, 400))
    seconds, found = speedrun.totals(out)
    assert found[-1] == 6.0 and seconds[-1] == 4 and len(found) == 6
    out = recorded(tmp_path / "epochs", bits, [[1, 2, 3, 4], [1, 2, 3, 4]], steps=(0,))
    assert speedrun.totals(out)[1][-1] == 2.0


def test_a_dry_run_of_the_speedrun_on_the_cpu(tmp_path):
    """reproduce.sh speedrun from data to records, on images that stand for CIFAR-10."""
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable, "RUNS": str(tmp_path / "runs"), "PRESET": "tiny",
        "HOLD_OUT": "2", "TEST": "2"}
    line = ["bash", HERE / "reproduce.sh", "speedrun", "0.02", "--data", tmp_path / "images.npy",
            "--batch-size", "2", "--device", "cpu"]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True)
    out = tmp_path / "runs" / "speedrun"
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = {path.name for path in out.iterdir()}
    assert {"speedrun.md", "speedrun.png", "records.tgz", "weights.pt", "parts", "eval-2.json",
            "sample-random-0-n64.png", "sample-map-0.png"} <= names
    text = (out / "speedrun.md").read_text()
    assert "2 images held out" in text and "2 test images" in text and "at the end" in text
    assert pixelaux.load(out / "weights.pt").config.model == "pyramid"


def test_a_dry_run_of_the_proof_on_the_cpu(tmp_path):
    """Each part's file has its command and what came out; none fails."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable, "RUNS": str(tmp_path / "runs"), "PRESET": "tiny", "SIZE": "16",
        "TESTS": "test_pixelaux.py"}
    # A compiler takes half a minute, even one that is missing a third of that: switched off here.
    environment["TORCH_COMPILE_DISABLE"] = "1"
    line = ["bash", HERE / "reproduce.sh", "proof"]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = ["bench-sample", "bench-train", "bench-train-compiled", "bench-train-float32", "tests"]
    said = {file.stem: file.read_text() for file in (tmp_path / "runs" / "proof").iterdir()}
    assert sorted(said) == names
    assert all(text.startswith(sys.executable) and "\n" in text for text in said.values())
    assert "16x16 | 8x8" in said["bench-train"] and "whole chain" in said["bench-sample"]
