#!/usr/bin/env bash
# The paper's experiments, each as the exact commands. Finished parts are skipped, interrupted ones resumed.
#
#   bash reproduce.sh smoke               the whole path in a minute, on the CPU (Sec. 3; built-in shapes)
#   bash reproduce.sh cifar10-grayscale   Sec. 4.1: 4-bit gray, CIFAR-10          paper: <= 2.98 bits/dim
#   bash reproduce.sh cifar10-pyramid     Sec. 4.2: pyramid, CIFAR-10             paper: <= 3.32 bits/dim
#   bash reproduce.sh celeba-pyramid      Sec. 4.2, Table 2: pyramid, CelebA 128  paper: <= 1.52 bits/dim
#   bash reproduce.sh table               paper | ours | hardware | hours | command, from what the runs recorded
#
# The record, time to bits/dim, and the proof that a GPU computes what it should:
#   bash reproduce.sh speedrun [MINUTES]  CIFAR-10 pyramid in MINUTES (default 7) of training over all factors, by the
#                                         preset speedrun: time to bits/dim of 1,000 training images that are held out,
#                                         then the whole test set, samples, MAP samples, weights in bfloat16. In
#                                         RUNS/speedrun: speedrun.md, weights in parts/, all the rest in records.tgz.
#                                         Goes on if run again; another machine goes on from the weights alone (--start)
#                                         MODEL=grayscale: the other model. BACK=DIR: copies of speedrun.md, records.tgz
#                                         and the parts, as they come into being
#   bash reproduce.sh proof               the tests on the GPU (without one they are skipped), and benchmarks, into
#                                         RUNS/proof, at most LIMIT seconds each
#   bash reproduce.sh pack PATH DIR       a file or folder as DIR/part.*, of PART MiB (default 15) at most, with checksums
#   bash reproduce.sh unpack DIR [WHERE]  the parts checked and put together in WHERE (default: beside DIR)
# Of these two a part that fails does not stop the next. A dry run on a CPU:
#   PRESET=tiny HOLD_OUT=100 TEST=100 bash reproduce.sh speedrun 1
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
target=${1:-help} failed=0
shift || true

run() {  # run NAME train-arguments...
  local out=$RUNS/$1
  trained "$@"
  part "$out/eval.json" eval "$out"
  part "$out/sample-random-0.npz" sample "$out" --n 16
  part "$out/sample-map-0.npz" sample "$out" --n 16 --mode map
  echo "$out is finished: eval.json, samples in sample-random-0.png and sample-map-0.png; without the folder it begins anew"
}

trained() {  # trained NAME train-arguments...
  local out=$RUNS/$1 launch=("$PYTHON") resume=
  shift
  [ -z "${NPROC:-}" ] || launch+=(-m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
  if [ "$(cat "$out/finished" 2> /dev/null)" != "$*" ]; then
    [ ! -e "$out/config.json" ] || resume=--resume
    "${launch[@]}" pixelaux.py train --out "$out" "$@" $resume || return
    echo "$*" > "$out/finished"
  fi
}

part() {  # part FILE pixelaux-arguments... makes FILE, unless it was made after the end of training
  [ "$1" -nt "$(dirname "$1")/finished" ] || "$PYTHON" pixelaux.py "${@:2}"
}

attempt() {  # attempt COMMAND... goes on if it fails, but not if it was stopped (within it, set -e does not hold)
  local status=0
  "$@" || status=$?
  case $status in 130 | 143) exit $status ;; esac  # any other, a crash too, is a failure
  [ $status = 0 ] || { failed=1; echo "reproduce.sh: failed ($status), going on: $*" >&2; }
}

pack() {  # pack PATH DIR
  [ $# = 2 ] && [ -e "$1" ] || { echo "reproduce.sh pack: expected a PATH that exists and a DIR, got: $*" >&2; return 2; }
  mkdir -p "$2"
  rm -f "$2"/part.* "$2/sums"
  tar -c -C "$(dirname "$1")" "$(basename "$1")" | split -b "${PART:-15}m" - "$2/part." || return
  (cd "$2" && sha256sum part.* > sums)
}

unpack() {  # unpack DIR [WHERE]
  [ -e "${1:-}/sums" ] || { echo "reproduce.sh unpack: expected a DIR made by pack, got: $*" >&2; exit 2; }
  (cd "$1" && sha256sum --check --quiet sums >&2)
  mkdir -p "${2:-$(dirname "$1")}"
  (cd "$1" && cut -c 67- sums | xargs cat) | tar -x -C "${2:-$(dirname "$1")}"
}

speedrun() {  # speedrun [MINUTES] train-arguments...
  local minutes=7 model=${MODEL:-pyramid} out=$RUNS/speedrun shares
  [[ ! ${1:-} =~ ^[0-9.]+$ ]] || { minutes=$1; shift; }
  # To each factor, coarsest first, so much that another second is worth the same in each (results/recipe.md).
  case $model in
    pyramid) shares="0.06 0.24 0.7" ;;
    grayscale) shares="0.25 0.75" ;;
    grayscale-pyramid) shares="0.04 0.08 0.18 0.7" ;;
    *) shares=1 ;;
  esac
  minutes=$(LC_ALL=C awk -v all="$minutes" '{ for (i = 1; i <= NF; i++) printf "%s%g", (i > 1 ? "," : ""), all * $i }' \
    <<< "$shares")
  attempt trained speedrun --model "$model" --data cifar10 --data-dir "$DATA_DIR" --preset "${PRESET:-speedrun}" \
    --minutes "$minutes" --hold-out "${HOLD_OUT:-1000}" "$@"
  attempt part "$out/weights.pt" export "$out" "$out/weights.pt"
  attempt pack "$out/weights.pt" "$out/parts"
  attempt recorded "$out"
  attempt part "$out/eval.json" eval "$out" ${TEST:+--n "$TEST"}
  attempt recorded "$out"
  attempt part "$out/sample-random-0-n64.npz" sample "$out" --n 64
  attempt part "$out/sample-map-0.npz" sample "$out" --mode map
  attempt recorded "$out"
}

recorded() {  # recorded DIR: time to bits/dim, all but the weights in DIR/records.tgz, and what is worth most in BACK, if set
  "$PYTHON" pixelaux.py speedrun "$1" || return
  tar -czf "$1.tgz" -C "$1" --exclude='*.pt' --exclude=parts --exclude=records.tgz . && mv "$1.tgz" "$1/records.tgz" || return
  [ -z "${BACK:-}" ] || { mkdir -p "$BACK" && cp "$1/speedrun.md" "$1/records.tgz" "$1"/parts/* "$BACK"; }
}

proof() {
  local bench=("$PYTHON" pixelaux.py bench) preset=${PRESET:-speedrun} size=${SIZE:-32}
  attempt logged tests "$PYTHON" -m pytest -q -k cuda ${TESTS:-}
  attempt logged bench-train "${bench[@]}" train --preset "$preset" --size "$size"
  attempt logged bench-sample "${bench[@]}" sample --model pyramid --preset "$preset" --size "$size"
  attempt logged bench-train-float32 "${bench[@]}" train --preset "$preset" --size "$size" --precision float32
  attempt logged bench-train-compiled "${bench[@]}" train --preset "$preset" --size "$size" --compile
}

logged() {  # logged NAME COMMAND... what it says also goes to RUNS/proof/NAME.txt; LIMIT: seconds it may take (default 600)
  mkdir -p "$RUNS/proof"
  { echo "${*:2}"; timeout "${LIMIT:-600}" "${@:2}"; } 2>&1 | tee "$RUNS/proof/$1.txt"
}

table() {
  "$PYTHON" - "$RUNS" << 'END'
import json, pathlib, sys
from pixelaux import read_records

paper = {"cifar10-grayscale": "2.98", "cifar10-pyramid": "3.32", "celeba-pyramid": "1.52"}
print("| run | paper, <= | ours, <= (factors) | ours, = | test images | hardware | hours | command |\n" + "| --- " * 8 + "|")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/eval.json")):
    def lines(name):  # none for factors that were brought together
        file = path.parent / name
        return list(read_records(file)) if file.exists() else []

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
  speedrun) speedrun "$@" ;;
  proof) proof ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$source"
    [ "$target" = help ] || { echo "reproduce.sh: unknown target $target" >&2; exit 2; } ;;
esac
exit $failed
