#!/usr/bin/env bash
# DVC 3.67.1, Python 3.11: a folder of Python code as a dependency is out of date in every fresh clone.
#
# A stage names the folder of its code among its `deps` and runs `python -m steps.run`. The run leaves bytecode in
# steps/__pycache__/, git ignores it as everybody's .gitignore does, and DVC takes the dependency's hash after the run:
# dvc.lock gets a hash over 4 files, of which 2 are bytecode. On the machine itself `dvc status` is quiet. Whoever
# clones the repository has no bytecode, or other bytecode (a .pyc holds the time of its source file), so DVC says that
# the code was modified, finds no run in its cache either, and trains again. Nothing in the code has changed. git's
# ignore rules do not count; DVC's own list of what is never data (.git, .hg, .dvc) does not have __pycache__.
#
# Expected: the lock holds a hash of the sources, and a clone is up to date.
# Seen:     nfiles: 4; in the clone "changed deps: modified: steps". With `__pycache__/` in .dvcignore: nfiles: 2, and
#           a clone is up to date.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check dvc==3.67.1
export PATH="$folder/env/bin:$PATH" DVC_SITE_CACHE_DIR="$folder/site" DVC_NO_ANALYTICS=1
unset PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX

mkdir project && cd project
git init -q && git config user.name finding && git config user.email finding@example.org
dvc init -q
mkdir steps
echo 'X = 1' > steps/part.py
printf 'from steps.part import X\nprint(X)\n' > steps/run.py
printf 'stages:\n  one:\n    cmd: python -m steps.run > out.txt\n    deps: [steps]\n    outs:\n      - out.txt: {cache: false}\n' > dvc.yaml
echo '__pycache__/' > .gitignore

compare() { # $1: files that the lock counts, $2: whether a clone is up to date
  dvc repro -q -f
  git add -A && git commit -qm "$1"
  grep -q "nfiles: $1" dvc.lock || { echo "changed: dvc.lock does not count $1 files"; exit 1; }
  dvc status | grep -q 'up to date' || { echo "changed: not up to date where it was made"; exit 1; }
  rm -rf "$folder/clone" && git clone -q . "$folder/clone"
  said=$(cd "$folder/clone" && dvc status)
  printf '%s files in the lock; in a clone:\n%s\n' "$1" "$said"
  case $2 in
    modified) grep -q 'modified: *steps' <<< "$said" || { echo "changed: the clone is up to date"; exit 1; } ;;
    same) grep -q 'up to date' <<< "$said" || { echo "changed: .dvcignore does not help"; exit 1; } ;;
  esac
}
compare 4 modified
echo '__pycache__/' > .dvcignore
compare 2 same
