#!/usr/bin/env bash
# The paper's experiments, each as the exact commands. Finished parts are skipped, interrupted ones resumed.
#
#   bash reproduce.sh smoke               the whole path in a minute, on the CPU (Sec. 3; built-in shapes)
#   bash reproduce.sh cifar10-grayscale   Sec. 4.1: 4-bit gray, CIFAR-10          paper: <= 2.98 bits/dim
#   bash reproduce.sh cifar10-pyramid     Sec. 4.2: pyramid, CIFAR-10             paper: <= 3.32 bits/dim
#   bash reproduce.sh celeba-pyramid      Sec. 4.2, Table 2: pyramid, CelebA 128  paper: <= 1.52 bits/dim
#   bash reproduce.sh table               paper | ours | hardware | hours | command, from what the runs recorded
#
# For a GPU that is there for half an hour at a time:
#   bash reproduce.sh half-hour TARGET    one of the three above in MINUTES (default 18) of training, not counting the
#                                         compilation, some minutes a factor; evaluation, benchmarks; in
#                                         RUNS/half-hour-TARGET: weights in parts/, all the rest in records.tgz.
#                                         Goes on if run again; another machine goes on from the weights alone (--start)
#   bash reproduce.sh benchmarks TARGET   the benchmarks alone, which need no data
#   bash reproduce.sh pack PATH DIR       a file or folder as DIR/part.*, of PART MiB (default 15) at most, with checksums
#   bash reproduce.sh unpack DIR [WHERE]  the parts checked and put together in WHERE (default: beside DIR)
# A dry run on a CPU: MINUTES=1 PRESET=tiny SIZE=32 bash reproduce.sh half-hour cifar10-pyramid
#
# DATA_DIR (default data) is where CIFAR-10 and CelebA are, RUNS (default runs) where results go. CIFAR-10 is
# downloaded; CelebA's img_align_celeba.zip has to be fetched by hand (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html).
# More arguments go to `train`, again when it is resumed: the same ones, or another RUNS:
#   bash reproduce.sh cifar10-pyramid --minutes 6,14,40      minutes a factor, coarsest first
#   NPROC=8 bash reproduce.sh celeba-pyramid --batch-size 64 on 8 GPUs, by torchrun
set -euo pipefail
trap 'exit 143' TERM  # sent to all, as timeout does: bash waits until the program has saved
DATA_DIR=${DATA_DIR:-data}
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-$(command -v python || echo python3)}
target=${1:-help}
shift || true

run() {  # run NAME train-arguments...
  local out=$RUNS/$1 launch=("$PYTHON") resume=
  shift
  [ -z "${NPROC:-}" ] || launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
  if [ "$(cat "$out/finished" 2> /dev/null)" != "$*" ]; then
    [ ! -e "$out/config.json" ] || resume=--resume
    "${launch[@]}" pixelaux.py train --out "$out" "$@" $resume
    echo "$*" > "$out/finished"
  fi
  part "$out/eval.json" eval "$out"
  part "$out/sample-random-0.npz" sample "$out" --n 16
  part "$out/sample-map-0.npz" sample "$out" --n 16 --mode map
  echo "$out is finished: eval.json, samples in sample-random-0.png and sample-map-0.png; without the folder it begins anew"
}

part() {  # part FILE pixelaux-arguments... makes FILE, unless it was made after the end of training
  [ "$1" -nt "$(dirname "$1")/finished" ] || "$PYTHON" pixelaux.py "${@:2}"
}

pack() {  # pack PATH DIR
  [ $# = 2 ] && [ -e "$1" ] || { echo "reproduce.sh pack: expected a PATH that exists and a DIR, got: $*" >&2; exit 2; }
  mkdir -p "$2"
  rm -f "$2"/part.* "$2/sums"
  tar -c -C "$(dirname "$1")" "$(basename "$1")" | split -b "${PART:-15}m" - "$2/part."
  (cd "$2" && sha256sum part.* > sums)
}

unpack() {  # unpack DIR [WHERE]
  [ -e "${1:-}/sums" ] || { echo "reproduce.sh unpack: expected a DIR made by pack, got: $*" >&2; exit 2; }
  (cd "$1" && sha256sum --check --quiet sums >&2)
  mkdir -p "${2:-$(dirname "$1")}"
  (cd "$1" && cut -c 67- sums | xargs cat) | tar -x -C "${2:-$(dirname "$1")}"
}

settings() {  # settings TARGET; shares: of the minutes, coarsest factor first
  case ${1:-} in
    cifar10-grayscale) model=grayscale data=cifar10 preset=cifar10 shares="0.25 0.75" size=32 ;;
    cifar10-pyramid) model=pyramid data=cifar10 preset=celeba shares="0.1 0.25 0.65" size=32 ;;
    celeba-pyramid) model=pyramid data=celeba preset=celeba shares="0.04 0.08 0.16 0.27 0.45" size=128 ;;
    *) echo "reproduce.sh: expected cifar10-grayscale, cifar10-pyramid or celeba-pyramid" >&2; exit 2 ;;
  esac
  name=half-hour-$1 preset=${PRESET:-$preset} size=${SIZE:-$size}
}

half_hour() {  # half_hour TARGET train-arguments...
  settings "${1:-}"
  local minutes
  minutes=$(awk -v minutes="${MINUTES:-18}" '{ for (i = 1; i <= NF; i++) printf "%s%g", (i > 1 ? "," : ""), minutes * $i }' \
    <<< "$shares")
  run "$name" --model $model --data $data --data-dir "$DATA_DIR" --preset "$preset" --minutes "$minutes" "${@:2}"
  part "$RUNS/$name/weights.pt" export "$RUNS/$name" "$RUNS/$name/weights.pt"
  pack "$RUNS/$name/weights.pt" "$RUNS/$name/parts"
  benchmarks "$1"
  tar -czf "$RUNS/$name.tgz" -C "$RUNS/$name" --exclude='*.pt' --exclude=parts --exclude=records.tgz .
  mv "$RUNS/$name.tgz" "$RUNS/$name/records.tgz"
}

benchmarks() {  # benchmarks TARGET
  settings "${1:-}"
  mkdir -p "$RUNS/$name"
  bench "$RUNS/$name/bench-train.txt" train --model $model --preset "$preset" --size "$size"
  bench "$RUNS/$name/bench-sample.txt" sample --model $model --preset "$preset" --size "$size"
}

bench() {  # bench FILE arguments... makes FILE, headed by the arguments, once
  if [ "$(head -n 1 "$1" 2> /dev/null)" != "bench ${*:2}" ]; then
    echo "bench ${*:2}" > "$1.part"
    "$PYTHON" pixelaux.py bench "${@:2}" | tee -a "$1.part"
    mv "$1.part" "$1"
  fi
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
    print(f"| {path.parent.name} | {paper.get(path.parent.name.removeprefix('half-hour-'), '-')} | {result['bound']:.4f} ({factors}) "
          f"| {result['exact']:.4f} | {result['images']} | {'; '.join(hardware)} | {sum(seconds.values()) / 3600:.2f} "
          f"| {'; '.join('`' + one['command'] + '`' for one in made)} |")
END
}

case $target in
  pack) pack "$@"; exit ;;  # here paths are the caller's
  unpack) unpack "$@"; exit ;;
esac
source=$(realpath "$0")
cd "$(dirname "$0")"
case $target in
  smoke) run smoke --model pyramid --steps 60 "$@" ;;
  cifar10-grayscale) run cifar10-grayscale --model grayscale --data cifar10 --data-dir "$DATA_DIR" --preset cifar10 "$@" ;;
  cifar10-pyramid) run cifar10-pyramid --model pyramid --data cifar10 --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  celeba-pyramid) run celeba-pyramid --model pyramid --data celeba --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  table) table ;;
  half-hour) half_hour "$@" ;;
  benchmarks) benchmarks "$@" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$source"
    [ "$target" = help ] || { echo "reproduce.sh: unknown target $target" >&2; exit 2; } ;;
esac
