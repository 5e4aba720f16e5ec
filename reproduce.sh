#!/usr/bin/env bash
# The paper's experiments, each as the exact commands. Finished parts are skipped, interrupted ones resumed.
#
#   bash reproduce.sh smoke               the whole path in a minute, on the CPU (Sec. 3; built-in shapes)
#   bash reproduce.sh cifar10-grayscale   Sec. 4.1: 4-bit gray, CIFAR-10          paper: <= 2.98 bits/dim
#   bash reproduce.sh cifar10-pyramid     Sec. 4.2: pyramid, CIFAR-10             paper: <= 3.32 bits/dim
#   bash reproduce.sh celeba-pyramid      Sec. 4.2, Table 2: pyramid, CelebA 128  paper: <= 1.52 bits/dim
#   bash reproduce.sh table               paper | ours | hardware | hours | command, from what the runs recorded
#
# DATA_DIR (default data) is where CIFAR-10 and CelebA are, RUNS (default runs) where results go. CIFAR-10 is
# downloaded; CelebA's img_align_celeba.zip has to be fetched by hand (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html).
# More arguments go to `train`, again when it is resumed: the same ones, or another RUNS; a larger budget alone goes on
# with a finished run:
#   bash reproduce.sh cifar10-pyramid --budget 6,14,40       minutes a factor, coarsest first
#   NPROC=8 bash reproduce.sh celeba-pyramid --batch-size 64 on 8 GPUs, by torchrun
set -euo pipefail
cd "$(dirname "$0")"
DATA_DIR=${DATA_DIR:-data}
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-python}
target=${1:-help}
shift || true

run() {  # run NAME train-arguments...
  local out=$RUNS/$1 launch=$PYTHON resume=
  shift
  [ -z "${NPROC:-}" ] || launch="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=$NPROC"
  if [ "$(cat "$out/finished" 2> /dev/null)" != "$*" ]; then
    [ ! -e "$out/config.json" ] || resume=--resume
    $launch pixelaux.py train --out "$out" "$@" $resume
    echo "$*" > "$out/finished"
  fi
  part "$out/eval.json" eval "$out"
  part "$out/sample-random-0.npz" sample "$out" --n 16
  part "$out/sample-map-0.npz" sample "$out" --n 16 --mode map
}

part() {  # part FILE pixelaux-arguments... makes FILE, unless it was made after the end of training
  [ "$1" -nt "$(dirname "$1")/finished" ] || "$PYTHON" pixelaux.py "${@:2}"
}

table() {
  "$PYTHON" - "$RUNS" << 'END'
import json, pathlib, sys

paper = {"cifar10-grayscale": "2.98", "cifar10-pyramid": "3.32", "celeba-pyramid": "1.52"}
print("| run | paper, <= | ours, <= (factors) | ours, = | test images | hardware | hours | command |\n" + "| --- " * 8 + "|")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/eval.json")):
    def lines(name):  # none for factors that were brought together; without a last one that a kill cut
        file = path.parent / name
        return [json.loads(line) for line in file.open() if line.endswith("\n")] if file.exists() else []

    result, made = json.loads(path.read_text()), lines("commands.jsonl")
    seconds = {line["factor"]: line["seconds"] for line in lines("metrics.jsonl")}  # the last of each factor
    hardware = {f"{one['processes']} x {one['hardware']}, torch {one['torch']}": 0 for one in made}
    factors = " + ".join(f"{factor['bound_of_x']:.3f}" for factor in result["factors"])
    print(f"| {path.parent.name} | {paper.get(path.parent.name, '-')} | {result['bound']:.4f} ({factors}) "
          f"| {result['exact']:.4f} | {result['images']} | {'; '.join(hardware)} | {sum(seconds.values()) / 3600:.2f} "
          f"| {'; '.join('`' + one['command'] + '`' for one in made)} |")
END
}

case $target in
  smoke) run smoke --model pyramid --steps 60 "$@" ;;
  cifar10-grayscale) run cifar10-grayscale --model grayscale --data cifar10 --data-dir "$DATA_DIR" --preset cifar10 "$@" ;;
  cifar10-pyramid) run cifar10-pyramid --model pyramid --data cifar10 --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  celeba-pyramid) run celeba-pyramid --model pyramid --data celeba --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  table) table ;;
  *) sed -n '2,17s/^# \{0,1\}//p' "$0"; [ "$target" = help ] || exit 2 ;;
esac
