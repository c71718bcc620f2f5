#!/usr/bin/env bash
# Tests as another machine would run them: the oldest instruction set, the C locale, another time zone, an empty home,
# a user who is not root and has no name, a checkout that nobody can write.
#     tools/test_portable.sh THREADS [pytest arguments]        runs the tests that compute where none are named
set -euo pipefail
threads=$1
shift
[ $# -gt 0 ] || set -- tests/ops tests/select tests/hf/test_{step,selection_state,history,weights,trainer,distributed}.py
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
mkdir "$scratch"/{checkout,home,tmp,path}
(cd "$repo" && git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from - --ignore-failed-read) \
    | tar --extract --directory "$scratch/checkout"
ln -s "$scratch/checkout/kernels" "$scratch/path/tokensel_kernels"  # as setup.py maps it
chmod -R a-w "$scratch/checkout"

somebody=()
if [ "$(id -u)" = 0 ]; then
    somebody=(unshare --user --map-user=54321 --map-group=54321)  # root's own files, without root's rights
    if ! "${somebody[@]}" true; then
        echo "test-portable: AS ROOT, who may write everywhere: this machine lets root be nobody else" >&2
        somebody=()
    fi
fi
cd "$scratch/checkout"
umask 077
environment=(PATH="$PATH" HOME="$scratch/home" TMPDIR="$scratch/tmp" LC_ALL=C TZ=Pacific/Kiritimati
    PYTHONPATH="$scratch/path:$scratch/checkout" PYTHONDONTWRITEBYTECODE=1
    ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS="$threads")
env -i "${environment[@]}" ${somebody[@]+"${somebody[@]}"} "$repo/.venv/bin/python" -m pytest -p no:cacheprovider -q -n auto --dist loadfile "$@"
