#!/usr/bin/env bash
# What zmoe does on this machine's GPU (CUDA or Metal): run it in a checkout whose environment has
# zmoe[bench,test], with nothing else on the GPU, and paste what it prints into an issue.
#
#   tools/check_gpu.sh          on a GPU; takes some minutes and 3 GB of temporary space
#   tools/check_gpu.sh --cpu    the same steps with tiny models, to try the script on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { printf 'check_gpu.sh: %s (usage: tools/check_gpu.sh [--cpu])\n' "$1" >&2; exit 2; }
[ $# -le 1 ] || usage "too many arguments"
python=${PYTHON:-python}
on_gpu=$("$python" -c 'import mlx.core as mx; print(mx.default_device().type == mx.gpu)' 2>/dev/null) ||
  usage "$python has no MLX: name another one in PYTHON"
case ${1-} in
  --cpu) families=--small layers=2 hidden=128 experts=8 ffn=128 vocab=1024 runs=1 tokens=4 ;;
  '')
    [ "$on_gpu" = True ] || usage "MLX computes on a CPU here: --cpu tries the script on it"
    # 5 billion parameters, of which a token takes 0.8: 2.9 GB with 4 bits.
    families='' layers=24 hidden=2048 experts=64 ffn=512 vocab=32768 runs=5 tokens=128
    ;;
  *) usage "unknown argument $1" ;;
esac

export TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
step() {
  printf '\n== %s (%ss)\n' "$1" "$SECONDS"
  shift
  "$@" || { printf 'FAILED with %s: %s\n' "$?" "$*"; failed=1; }
}

step "the machine, and the embedded model in every mode" "$python" -m zmoe.cli.doctor.command
# shellcheck disable=SC2086  # an empty one is none
step "tiny families, plain and with 4 bits, on 1 and 2 nodes" "$python" tools/check_families.py $families
step "a model of random weights" "$python" bench/make_model.py "$work/model" --family qwen3_moe \
  --layers $layers --hidden $hidden --experts $experts --top-k 8 --ffn $ffn --vocab $vocab \
  --bits 4 --group-size 64
step "decode speed against mlx-lm: milliseconds per token" \
  "$python" bench/graph.py "$work/model" --runs $runs --max-tokens $tokens
printf '\n== done (%ss)\n' "$SECONDS"
exit $failed
