#!/usr/bin/env bash
# Everything that waits for a GPU, in stages that can be run alone; rows are appended, never rewritten.
#   bash bench/gpu_report.sh [build|tests|kernels|attention|small|large|compiled|account|training|sampling ...]    (without arguments: all stages)
# Each stage ends within eight minutes. Needs torch, nvcc and what the `test` extra brings; no network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_report: no CUDA device (or no CUDA build of torch)" >&2
    exit 2
}
failed=0
stage() { # NAME COMMAND...: its output to the screen and to a log; a failure does not stop the others
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    timeout 470 "$@" 2>&1 | tee "$OUT/$name.log" || failed=1
}
throughput() { # NAME OPTIONS...
    local name=$1
    shift
    stage "$name" python bench/throughput.py --device cuda --json "$OUT/throughput.jsonl" --plot "$OUT/$name.png" "$@"
}

ROOF=sdpa-no-bias
TRITON=triton-lookup-recompute,triton-lookup-store,triton-dense-recompute,triton-dense-store,triton-packed
ops() { # SCRIPT NAME OPTIONS...: single ops
    local script=$1 name=$2
    shift 2
    stage "$name" python "bench/$script.py" --device cuda --json "$OUT/$script.jsonl" --plot "$OUT/$name.png" "$@"
}

for what in ${@:-build tests kernels attention small large compiled account training sampling}; do
    case $what in
    build) # csrc/ for the GPU that is here
        MDT_FAST_CUDA=1 stage build python -m pip install --no-deps --no-build-isolation -e .
        ;;
    tests) stage gpu_tests python -m pytest -q -ra -m gpu tests ;;
    kernels)
        ops kernels kernels_xl --model XL --dtype bfloat16
        ops kernels kernels_s --model S --dtype bfloat16 --providers fast,eager --time-limit 100
        ;;
    attention) # flex apart: it compiles for every shape
        ops attention attention_bf16 --providers "$ROOF,sdpa,xformers,flash_attn,$TRITON" --time-limit 220
        ops attention attention_flex --providers "$ROOF,flex" --tokens 256,1024 --time-limit 120
        ops attention attention_f32 --providers "$ROOF,sdpa,$TRITON" --dtype float32 --tokens 256 --time-limit 60
        ;;
    small) throughput s2_b2 --model MDTv2_S_2,MDTv2_B_2 --batch 4,32 --dtype bfloat16 --providers reference,fast --time-limit 400 ;;
    large) throughput xl2 --model MDTv2_XL_2 --batch 4,32 --dtype bfloat16 --providers reference,fast --time-limit 400 ;;
    compiled) throughput xl2_compiled --model MDTv2_XL_2 --batch 32 --mode train --dtype bfloat16 \
        --providers reference,reference-compiled,fast,fast-compiled --time-limit 400 ;;
    account) stage account python bench/throughput.py --device cuda --json "$OUT/account.jsonl" --account \
        --model MDTv2_S_2,MDTv2_XL_2 --batch 4,32 --dtype bfloat16 ;;
    training) # what surrounds a step: loader, encoding, the loop, saves
        stage training python bench/training.py --device cuda --json "$OUT/training.jsonl" --repeats 7
        stage training_xl2 python bench/training.py --device cuda --json "$OUT/training.jsonl" --parts step,save \
            --preset mdtv2-xl2 --batch 32 --repeats 5
        ;;
    sampling) stage sampling python bench/throughput.py --device cuda --json "$OUT/sampling.jsonl" --account --mode sample \
        --model MDTv2_S_2,MDTv2_XL_2,DiT_XL_2 --batch 1,32 --dtype bfloat16 --time-limit 500 ;;
    *) echo "gpu_report: unknown stage $what; known: build tests kernels attention small large compiled account training sampling" >&2; exit 2 ;;
    esac
done
exit $failed
