"""What a newcomer trips over: installation, sizes of images, curves, messages, names, leftovers."""
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pathlib
import pydoc
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import pixelaux
from pixelaux import Half, Problem, Shapes, build, main

HERE = pathlib.Path(__file__).resolve().parents[1]
bench, codec, curves, formats, images = map(
    pixelaux.tool, ("bench", "codec", "curves", "formats", "images"))
torch.set_num_threads(1)
settings.register_profile(
    "newcomer", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("newcomer")

STAGES = pixelaux.six_stages(1)
SMALL = dict(
    nr_filters=6, nr_logistic_mix=2, layout=STAGES, layout_cond=STAGES, layout_light=((0, 1),),
    layout_embed=((1, 1), (2, 1), (1, 1), (0, 1)), dropout=0.0, batch_size=2, steps=(4, 3))


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """The preset "tiny" trains in no time."""
    before = pixelaux.PRESETS["tiny"]
    pixelaux.PRESETS["tiny"] = {**before, **SMALL, "warmup": 0}
    yield
    pixelaux.PRESETS["tiny"] = before


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_preset):
    """A short run of the factors 8x8, 4 steps, and 16x16 | 8x8, 3 steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert command("train --out", out)[0] == 0
    return out


def command(line, *more):
    """(status, stdout, the program's own lines on stderr) of a command, on the CPU."""
    arguments = [*line.split(), *map(str, more)]
    if arguments[0] in ("train", "eval", "sample", "bench", "compress", "decompress"):
        arguments += ["--device", "cpu"]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
    lines = error.getvalue().replace("\r", "\n").splitlines()
    return status, out.getvalue(), [line for line in lines if line.startswith("pixelaux: ")]


def copy_of(run, out):
    shutil.copytree(run, out)
    return out


# --- Installation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` folder of a virtual environment with the program, beside this one's packages."""
    try:
        importlib.metadata.version("pip")
        if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
            pytest.skip("setuptools 77 is needed")
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is needed")
    place = tmp_path_factory.mktemp("install")
    source, bin = place / "clone", place / "venv" / "bin"
    package = pathlib.Path(codec.__file__).parent
    shutil.copytree(package, source / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pixelaux.py", "pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(HERE / name, source)
    make = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", place / "venv"]
    subprocess.run(make, check=True)
    ask = [bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    # The packages of the environment that runs us, which may be a virtual one in turn.
    ours = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    pathlib.Path(packages, "ours.pth").write_text("\n".join(ours))
    install = [bin / "python", "-m", "pip", "install", "--quiet", "--no-deps",
               "--no-build-isolation", "--disable-pip-version-check", "."]
    subprocess.run(install, cwd=source, check=True)
    shutil.rmtree(source)
    return bin


def done(*arguments, cwd, **env):
    """Stdout of a process that must succeed."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}
    result = subprocess.run([str(argument) for argument in arguments], cwd=cwd, text=True,
                            capture_output=True, timeout=500, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_installed_it_runs_in_an_empty_folder(installed, tmp_path):
    """Main job and tools, beside a folder `tools` of somebody else's."""
    (tmp_path / "tools").mkdir()
    for name in ("__init__", "curves", "export"):
        (tmp_path / "tools" / f"{name}.py").write_text("raise SystemExit('not ours')")
    env = dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    told = done(installed / "pixelaux", "--version", cwd=tmp_path)
    assert told == f"pixelaux {pixelaux.__version__}\n"
    steps = ["--model", "pyramid", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    told = done(installed / "pixelaux", "train", *steps, cwd=tmp_path, **env)
    assert "next: pixelaux eval runs/pyramid-shapes" in told
    run = tmp_path / "runs" / "pyramid-shapes"
    assert (run / "samples.png").exists() and (run / "curves.png").exists()
    (run / "curves.png").unlink()
    code = "import pixelaux; print(pixelaux.main(['curves', 'runs/pyramid-shapes']))"
    assert done(installed / "python", "-c", code, cwd=tmp_path, **env).endswith("0\n")
    assert (run / "curves.png").exists()


def test_installed_it_is_imported_beside_a_folder_of_its_name(installed, tmp_path):
    """As beside the clone. Control: where it is not installed, the folder is imported."""
    (tmp_path / "pixelaux").mkdir()
    code = "import pixelaux; print(pixelaux.build('pixelcnn', 8).dims, pixelaux.tool('codec'))"
    assert done(installed / "python", "-c", code, cwd=tmp_path).startswith("192 ")
    bare = [sys.executable, "-c", "import pixelaux; print(hasattr(pixelaux, 'build'))"]
    if importlib.util.find_spec("pixelaux").origin.startswith(str(HERE)):
        assert done(*bare, cwd=tmp_path) == "False\n"


def test_what_is_installed_says_what_it_needs(installed, tmp_path):
    """The packages of requirements.txt and the version of the file, each from its one place."""
    code = "import importlib.metadata as m; print(m.version('pixelaux'), *m.requires('pixelaux'))"
    version, *needed = done(installed / "python", "-c", code, cwd=tmp_path).split()
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert needed == [line.split("#")[0].strip() for line in lines] and len(needed) > 5
    assert version == pixelaux.__version__
    assert pixelaux.__version__ not in (HERE / "pyproject.toml").read_text()


# --- Compression of any size -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """An untrained pyramid that takes multiples of 4."""
    made = build("pyramid", 16, **{**SMALL, "halvings": 1})
    made.initialise(torch.from_numpy(Shapes((16, 16)).sample(16, 0)).permute(0, 3, 1, 2))
    return made.eval()


@settings(max_examples=10)
@given(height=st.integers(1, 13), width=st.integers(1, 13), seed=st.integers(0, 99))
def test_images_of_any_size_come_back(model, height, width, seed):
    """From a header that tells their size, in the bits of the padded image and no more."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(256, size=(3, height, width), dtype=np.uint8))
    file = codec.pack(model, x)
    assert torch.equal(codec.unpack(model, file), x)
    assert [int.from_bytes(file[i : i + 4], "little") for i in (16, 20)] == [height, width]
    padded, multiple = x.numpy(), model.size_multiple
    while padded.shape[1] % multiple:
        padded = np.concatenate([padded, padded[:, -1:]], 1)
    while padded.shape[2] % multiple:
        padded = np.concatenate([padded, padded[:, :, -1:]], 2)
    assert max(padded.shape[1] - height, padded.shape[2] - width) < multiple  # no more than needed
    fitting = model.resized(padded.shape[1:])
    words = codec.compress(fitting, torch.from_numpy(padded)[None])[0]
    assert file[25:-4] == words.astype("<u4").tobytes()


def test_the_multiple_is_the_least_that_fits(model):
    """Control: any other side is refused."""
    fits = []
    for side in range(1, 3 * model.size_multiple + 1):
        with contextlib.suppress(Problem):
            model.resized((side, 2 * model.size_multiple))
            fits.append(side)
    assert fits == [model.size_multiple, 2 * model.size_multiple, 3 * model.size_multiple]


def test_a_file_of_the_earlier_format_is_told_from_a_foreign_one(model):
    file = codec.pack(model, torch.zeros(3, 16, 16, dtype=torch.uint8))
    older = b"PXA2" + file[4:-4]
    older += zlib.crc32(older).to_bytes(4, "little")
    with pytest.raises(Problem, match="of format PXA2, expected PXA6"):
        codec.unpack(model, older)
    with pytest.raises(Problem, match="not a .pxa file"):
        codec.unpack(model, b"PNG" + file[3:])
    with pytest.raises(Problem, match="truncated or altered"):
        codec.unpack(model, b"PXA2" + file[4:])


def test_compress_tells_both_sizes(run, tmp_path):
    """Of a JPEG photograph of odd sides; bits/dim are those of the pixels that it has."""
    pixels = Shapes((24, 24)).sample(1, 0)[0][:17, :19]
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=90)
    photo, packed, out = (tmp_path / name for name in ("photo.jpg", "photo.pxa", "back"))
    status, told, _ = command("compress", run, photo)
    sizes = f"{photo} {photo.stat().st_size:,} bytes -> {packed} {packed.stat().st_size:,} bytes, "
    rate = 8 * packed.stat().st_size / (17 * 19 * 3)
    assert status == 0 and told == f"{sizes}{rate:.3f} bits/dim, height 17, width 19\n"
    assert command("decompress", run, packed, "--out", out)[0] == 0
    back = np.array(Image.open(out / "photo.png"))
    assert np.array_equal(back, np.array(Image.open(photo)))


# --- Curves ------------------------------------------------------------------------------------


def curves_of(out, model, monkeypatch, **config):
    """{title: the limit drawn in the panel, or None}."""
    from matplotlib.figure import Figure

    out.mkdir()
    pixelaux.write_config(out, dataclasses.replace(model.config, **config))
    lines = []
    for k in range(len(model.names)):
        for step in (5, 10):
            lines.append(dict(factor=k, step=step, seconds=step, bits_per_dim=9.0,
                              test_bits_per_dim=8.0))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    curves.save_curves(out, model.names)
    found = {}
    for axis in figures[-1].axes:
        flat = [line for line in axis.get_lines() if "limit" in line.get_label()]
        found[axis.get_title()] = flat[0].get_ydata()[0] if flat else None
        low, high = axis.get_ylim()
        assert not flat or low < found[axis.get_title()] < high
    return found


def test_curves_show_the_limit_where_the_truth_is_known(tmp_path, monkeypatch):
    """On the images of the test points, against numbers from Shapes itself."""
    def truth(side, of):
        x = Shapes((side, side)).sample(512, (0, 20170806))[:128]
        half = Half()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        shapes = Shapes((side, side))
        nats = {"x": shapes.log_prob(x), "half": shapes.log_prob_half(half)}
        nats["x | half"] = nats["x"] - nats["half"]
        return -nats[of].mean() / math.log(2) / (3 * side * side)

    made = [(build("pixelcnn", 16, **SMALL), ["x"]),
            (build("pyramid", 16, **SMALL), ["half", "x | half"]),
            (build("pyramid", 32, **SMALL), [None, None, "x | half"]),
            (build("grayscale", 16, **SMALL), [None, None])]
    for i, (model, known) in enumerate(made):
        found = curves_of(tmp_path / str(i), model, monkeypatch)
        assert list(found) == model.names
        for limit, of in zip(found.values(), known, strict=True):
            side = model.config.size[0]
            assert limit is None if of is None else limit == pytest.approx(truth(side, of))
    other = curves_of(tmp_path / "other", made[1][0], monkeypatch, data="cifar10")  # control
    assert set(other.values()) == {None}


# --- CIFAR-10's places -------------------------------------------------------------------------


def test_where_cifar10_is_looked_for_is_told_if_it_cannot_be_fetched(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    line = f"train --data cifar10 --data-dir {tmp_path} --out"
    status, _, lines = command(line, tmp_path / "run")
    assert status == 2 and len(lines) == 1
    for part in ("no network", f"{tmp_path}/cifar-10-binary.tar.gz", "data_batch_1.bin",
                 "test_batch.bin", f"{tmp_path}[/cifar-10-batches-bin]"):
        assert part in lines[0], part
    help = " ".join(command("train --help")[1].split())
    assert "cifar-10-binary.tar.gz" in help and "cifar-10-batches-bin" in help


# --- Finished runs, and what is said of them ---------------------------------------------------


def test_a_finished_run_says_so_when_it_is_resumed(run, tmp_path):
    """In one line, of all factors or of one. Control: one that is not finished does not."""
    out = copy_of(run, tmp_path / "run")
    status, told, _ = command("train --resume --out", out)
    first = told.splitlines()[0]
    assert status == 0
    assert first.startswith(f"{out} was finished before; ")
    assert "--start" in first and told.count("was finished before") == 1
    status, told, _ = command("train --resume --factor 1 --out", out)
    assert status == 0 and told.startswith(f"{out} was finished before; ")
    (out / "factor-1.pt").unlink()
    status, told, _ = command("train --resume --out", out)
    assert status == 0 and "was finished" not in told


def test_a_finished_part_of_reproduce_says_so(tmp_path):
    """Also when nothing is left to be done; then no program is started."""
    stub, out = tmp_path / "python", tmp_path / "runs" / "smoke"
    stub.write_text(f"""#!/usr/bin/env bash
        echo "$*" >> {tmp_path}/log
        sleep 0.05; mkdir -p {out}; touch {out}/config.json
        case "$*" in *eval*) touch {out}/eval.json ;; *map*) touch {out}/sample-map-0.npz ;;
          *sample*) touch {out}/sample-random-0.npz ;; esac""")
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "RUNS": str(tmp_path / "runs")}
    calls = []
    for _ in range(2):
        line = ["bash", str(HERE / "reproduce.sh"), "smoke"]
        told = subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout
        calls.append((tmp_path / "log").read_text().count("\n"))
        assert told.startswith(f"{out} is finished") and told.count("\n") == 1
    assert calls == [4, 4]


def test_eval_tells_which_files_it_has_read(run, tmp_path):
    """One checkpoint of a run, the whole run, and a file with all factors."""
    (exported := tmp_path / "weights.pt").exists() or command("export", run, exported)
    both = f"weights: {run / 'factor-0.pt'}, {run / 'factor-1.pt'}\n"
    for place, expected in ((run / "factor-0.pt", both), (run, both),
                            (exported, f"weights: {exported}\n")):
        status, told, _ = command("eval", place, "--n", 1)
        assert status == 0 and told.startswith(expected)


@pytest.mark.parametrize("n", [1, 2])
def test_one_image_is_not_several(run, n):
    told = command("eval", run, "--n", n, "--coded", n)[1]
    assert f"\n{n} test image{'s' * (n - 1)}, bits/dim" in told
    assert f"\n{n} image{'s' * (n - 1)} coded" in told


def test_samples_of_another_number_or_way_have_names_of_their_own(run, tmp_path):
    """The usual number has the short name."""
    out = copy_of(run, tmp_path / "run")
    for line in ("--n 16", "--n 2", "--n 2 --naive"):
        assert command("sample", out, *line.split())[0] == 0
    names = {path.stem for path in out.glob("sample-*.png")}
    assert names == {"sample-random-0", "sample-random-0-n2", "sample-random-0-n2-naive"}


# --- Weights of one's own, and of others -------------------------------------------------------


def test_saved_weights_are_loaded_evaluated_and_sampled(tmp_path):
    model = build("pyramid", 16, seed=3)
    pixelaux.save(model, tmp_path / "mine.pt")
    again = pixelaux.load(tmp_path / "mine.pt")
    other = build("pyramid", 16, seed=4)
    pairs = list(zip(model.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)  # control
    for line in ("eval --n 2", "sample --n 2"):
        name, *more = line.split()
        assert command(name, tmp_path / "mine.pt", *more)[0] == 0
    begun = ["--start", tmp_path / "mine.pt", "--steps", 1, "--out", tmp_path / "run"]
    assert command("train", *begun)[0] == 0


@pytest.mark.parametrize("flags, weight", [
    ("--preset small", r"factors.0.net.v_first.v is \(6, .*\), expected \(48, .*\)"),
    ("--model grayscale", "a pyramid of 2 views, expected a grayscale of 2 views"),
    ("--size 32", "a pyramid of 2 views, expected a pyramid of 3 views"),
])
def test_a_start_from_another_model_names_the_weight(run, tmp_path, flags, weight):
    """In one line, before anything is begun. Control: the run's own flags."""
    line = f"train {flags} --steps 1 --batch-size 2 --start {run} --out"
    status, _, lines = command(line, tmp_path / "new")
    assert status == 2 and len(lines) == 1 and not (tmp_path / "new").exists()
    assert "of another model, preset or size: " in lines[0]
    assert re.search(weight, lines[0]) and "size mismatch" not in lines[0]
    assert command("train --steps 1 --batch-size 2 --start", run, "--out", tmp_path / "new")[0] == 0


# --- Leftovers and signals ---------------------------------------------------------------------


def test_what_killed_writers_left_is_removed_and_nothing_else(run, tmp_path):
    """What is younger than an hour may still be written."""
    out = copy_of(run, tmp_path / "run")
    ages = {"part-old": 3700, "part-young": 3000, "other-old": 9999}
    for name, age in ages.items():
        (out / name).touch()
        os.utime(out / name, (time.time() - age,) * 2)
    assert command("train --resume --out", out)[0] == 0
    assert [name for name in ages if (out / name).exists()] == ["part-young", "other-old"]


def test_a_stop_while_compiling_is_no_missing_compiler(run, monkeypatch, capsys):
    """Control: without a signal, the compiler's failure is warned of, and training goes on."""
    def killed(*_, **__):
        raise RuntimeError("g++ was terminated")

    monkeypatch.setattr(torch, "compile", killed)
    factor = build("pixelcnn", 8).factors[0]
    batch = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None
    with pytest.raises(KeyboardInterrupt, match="stopped while compiling"):
        pixelaux.wrapped(factor, batch, False, True, lambda: True)
    assert capsys.readouterr().err == ""
    assert pixelaux.wrapped(factor, batch, False, True, lambda: False) is factor
    assert "g++ was terminated" in capsys.readouterr().err


def test_training_hands_its_signals_to_the_compilation(tmp_path, monkeypatch):
    """A SIGTERM while a compiler runs: the command ends as stopped, without a warning."""
    def killed(*_, **__):
        os.kill(os.getpid(), 15)
        raise RuntimeError("g++ was terminated")

    monkeypatch.setattr(torch, "compile", killed)
    status, _, lines = command("train --compile --out", tmp_path / "run")
    assert status == 130 and lines == ["pixelaux: stopped while compiling; --resume goes on"]


# --- How long a benchmark takes ----------------------------------------------------------------


def test_bench_begins_with_an_estimate(monkeypatch):
    """Of time and memory for sampling, of time for training."""
    told = command("bench sample --model pyramid --size 16 --batch-size 1")[1].splitlines()
    assert re.fullmatch(r"estimate: a minute or less, up to \d+ GiB of memory, .*", told[1])
    told = command("bench train --model pixelcnn --size 8 --batch-size 1")[1].splitlines()
    assert re.fullmatch(r"estimate: a minute or less, if nothing else .*", told[1])
    assert bench.expected(600, 6.2).startswith("estimate: 10 minutes, up to 7 GiB")


def test_the_estimate_counts_the_rows_that_fit(monkeypatch):
    """In proportion to a pass and to the number of images; those left out take no time."""
    model = build("pixelcnn", 8)
    factor = model.factors[-1]
    for of_pass in (1.0, 5.0):
        monkeypatch.setattr(bench, "seconds", lambda *_: [of_pass])
        monkeypatch.setattr(bench, "available", lambda device: bench.memory_of(factor, 20))
        alone, gib = bench.estimate([model], [16])
        assert bench.estimate([model], [16, 64]) == (alone, gib)
        assert bench.estimate([model, model], [16, 64]) == (2 * alone, gib)
        assert 2 * 16 * 3 * of_pass <= alone <= 2 * 16 * 6 * of_pass
        assert gib == bench.memory_of(factor, 16) / 2**30
        assert bench.estimate([model], [64]) == (0, 0)


def test_free_memory_is_not_more_than_there_is():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < bench.available(torch.device("cpu")) <= total


# --- Documentation -------------------------------------------------------------------------------


def test_pydoc_shows_what_is_public_and_no_documentation_of_others():
    """Control: a class with an array among its attributes brings numpy's."""
    text = pydoc.plain(pydoc.render_doc(pixelaux))
    assert all(re.search(rf"^ +(class )?{name}\b", text, re.M) for name in pixelaux.__all__
               if name not in ("PRESETS", "MODELS"))
    assert "ndarray(" not in text
    other = type("Other", (), dict(array=np.zeros(2)))
    assert "ndarray(" in pydoc.plain(pydoc.render_doc(other))
