#!/usr/bin/env bash
# The paper's experiments, each as the exact commands. Finished factors are skipped, interrupted ones resumed.
#
#   bash reproduce.sh smoke               the whole path in a minute, on the CPU (Sec. 3; built-in shapes)
#   bash reproduce.sh cifar10-grayscale   Sec. 4.1: 4-bit gray, CIFAR-10          paper: <= 2.98 bits/dim
#   bash reproduce.sh cifar10-pyramid     Sec. 4.2: pyramid, CIFAR-10             paper: <= 3.32 bits/dim
#   bash reproduce.sh celeba-pyramid      Sec. 4.2, Table 2: pyramid, CelebA 128  paper: <= 1.52 bits/dim
#
# DATA_DIR (default data) is where CIFAR-10 and CelebA are, RUNS (default runs) where results go. CIFAR-10 is
# downloaded; CelebA's img_align_celeba.zip has to be fetched by hand (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html).
# More arguments go to `train`: bash reproduce.sh cifar10-pyramid --budget 60
set -euo pipefail
cd "$(dirname "$0")"
DATA_DIR=${DATA_DIR:-data}
RUNS=${RUNS:-runs}
target=${1:-help}
shift || true

run() {  # run NAME train-arguments...
  local out=$RUNS/$1
  shift
  if [ -e "$out/config.json" ]; then
    python pixelaux.py train --resume --out "$out"
  else
    python pixelaux.py train --out "$out" "$@"
  fi
  python pixelaux.py eval "$out"
  python pixelaux.py sample "$out" --n 16
  python pixelaux.py sample "$out" --n 16 --mode map
}

case $target in
  smoke) run smoke --model pyramid --steps 60 "$@" ;;
  cifar10-grayscale) run cifar10-grayscale --model grayscale --data cifar10 --data-dir "$DATA_DIR" --preset cifar10 "$@" ;;
  cifar10-pyramid) run cifar10-pyramid --model pyramid --data cifar10 --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  celeba-pyramid) run celeba-pyramid --model pyramid --data celeba --data-dir "$DATA_DIR" --preset celeba "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; [ "$target" = help ] || exit 2 ;;
esac
