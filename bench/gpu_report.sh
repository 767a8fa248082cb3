#!/usr/bin/env bash
# Run every check and measurement that needs a GPU, in separate stages; rows are appended, never rewritten.
#   bash bench/gpu_report.sh [STAGE...]      without arguments, all stages in this order (see docs/gpu.md):
#   build tests sanitize races kernels attention flex small middle large tf32 host compiled compiled4 whole float8
#   precisions official account training breakdown switches sampling sampling_compiled tune learning report
# If a GPU is available for minutes only: `first`, then `survey` (or its parts: survey_ahead survey_large survey_128
# survey_small survey_sample survey_compiled survey_switches) and single stages.
# Each stage ends within eight minutes. If one fails or runs out of time, the others still run and its own results
# are kept. Requires torch, nvcc and the packages of the `test` extra; uses no network.
# Environment variables: OUT (bench/results), OFFICIAL (a checkout of the official code), PYTHON (python or python3),
# LIMIT (seconds per stage, 470), JOBS (parallel test processes, 8: they spend most of their time compiling).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-bench/results}
OFFICIAL=${OFFICIAL:-}
PYTHON=${PYTHON:-$(command -v python >/dev/null && echo python || echo python3)}
LIMIT=${LIMIT:-470}
JOBS=${JOBS:-8}
STAGES=(build tests sanitize races kernels attention flex small middle large tf32 host compiled compiled4 whole float8
    precisions official account training breakdown switches sampling sampling_compiled tune learning report)
PARTS=(survey_ahead survey_large survey_128 survey_small survey_sample survey_compiled survey_switches)

asked=("$@")
((${#asked[@]})) || asked=("${STAGES[@]}")
for name in "${asked[@]}"; do
    if [[ $name == -h || $name == --help ]]; then
        sed -n '2,12s/^# \{0,1\}//p' bench/gpu_report.sh
        exit 0
    fi
    [[ $name != *" "* && " first survey ${PARTS[*]} ${STAGES[*]} " == *" $name "* ]] || {
        echo "gpu_report: unknown stage $name; known: first survey ${PARTS[*]} ${STAGES[*]}" >&2
        exit 2
    }
done
[[ $LIMIT =~ ^[1-9][0-9]{0,5}$ ]] || {
    echo "gpu_report: LIMIT: got '$LIMIT', expected whole seconds, 1 or more" >&2
    exit 2
}
mkdir -p "$OUT" || exit 2
"$PYTHON" -c 'import torch' 2>/dev/null || {
    echo "gpu_report: $PYTHON (PYTHON) cannot import torch" >&2
    exit 2
}
[[ ${asked[*]} == report ]] || "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_report: no CUDA device (or no CUDA build of torch)" >&2
    exit 2
}

declare -A logged
run() { # NAME COMMAND...: within the rest of the stage's time, with output on the screen and in a log
    local log="$OUT/$1.log" left=$((ends - SECONDS)) code
    shift
    printf '\n== %s: %s\n' "$stage" "$*"
    if ((left <= 0)); then
        echo "out of time before it began"
        [[ $worst != 0 ]] || worst=124
        return
    fi
    [[ ${logged[$log]:-} ]] || : >"$log" # all commands with the same name share one log
    logged[$log]=yes
    timeout -k 10 "$left" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || [[ $code == 124 && $worst != 0 ]] || worst=$code
}
bench() { # SCRIPT NAME OPTIONS...: append rows to SCRIPT's file and draw a picture
    local script=$1 name=$2
    shift 2
    run "$name" "$PYTHON" "bench/$script.py" --device cuda --json "$OUT/$script.jsonl" --plot "$OUT/$name.png" "$@"
}
rows() { # SCRIPT FILE OPTIONS...: append rows to FILE, without a picture
    local script=$1 file=$2
    shift 2
    run "$stage" "$PYTHON" "bench/$script.py" --device cuda --json "$OUT/$file.jsonl" "$@"
}

ROOF=sdpa-no-bias
TRITON=triton-lookup-recompute,triton-lookup-store,triton-dense-recompute,triton-dense-store,triton-packed
COMPILED=reference,reference-blocks-compiled,fast,fast-blocks-compiled

build() { run build env MDT_FAST_CUDA=1 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .; }
gpu_tests() { # NAME FILE...
    local name=$1 together=()
    shift
    "$PYTHON" -c 'import xdist' 2>/dev/null && together=(-n "$JOBS")
    run "$name" "$PYTHON" -m pytest -q -ra -m gpu "${together[@]}" "$@"
}
tests() { gpu_tests gpu_tests tests; }
sanitized() { # NAME TOOL: in parallel processes, which spend most of their time compiling
    run "$1" "$PYTHON" bench/sanitize.py --device cuda --tool "$2" --jobs "$(((JOBS + 1) / 2))" \
        --json "$OUT/sanitize.jsonl"
}
sanitize() { # afterwards the calls alone, already compiled: are all kernels reached?
    sanitized sanitize_memcheck memcheck
    run sanitize_calls "$PYTHON" bench/sanitize.py --device cuda
}
races() { sanitized races racecheck; }
kernels() {
    bench kernels kernels_xl --model XL --dtype bfloat16
    bench kernels kernels_s --model S --dtype bfloat16 --providers fast,eager --time-limit 100
}
attention() {
    bench attention attention_bf16 --providers "$ROOF,sdpa,xformers,flash_attn,$TRITON" --dtype bfloat16 \
        --head-dim 64,72,128 --time-limit 300
    bench attention attention_f32 --providers "$ROOF,sdpa,$TRITON" --dtype float32 --tokens 256 --time-limit 60
}
flex() { # a separate stage, as flex compiles for every shape
    bench attention attention_flex --providers "$ROOF,sdpa,flex,$TRITON" --tokens 256,1024 --time-limit 400
}
small() {
    bench throughput s2_b2 --model MDTv2_S_2,MDTv2_B_2 --batch 4,32 --dtype bfloat16 \
        --providers reference,fast,fast-graphs --time-limit 400
}
middle() { # L/2, and the DiT baseline next to that of diffusers
    bench throughput l2 --model MDTv2_L_2 --batch 4,32 --dtype bfloat16 --providers reference,fast --time-limit 200
    bench throughput dit --model DiT_XL_2 --batch 4,32 --dtype bfloat16 --providers reference,fast,diffusers \
        --time-limit 200
}
large() { # float32 as well, in which the published models were trained
    bench throughput xl2 --model MDTv2_XL_2 --batch 4,32 --dtype bfloat16 --providers reference,fast,fast-graphs \
        --time-limit 250
    bench throughput xl2_f32 --model MDTv2_XL_2 --batch 32 --mode train --dtype float32 \
        --providers reference,fast --time-limit 150
}
tf32() { # float32 with TF32 products: attention, the model, launch choices
    local -x TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
    bench attention attention_tf32 --providers "$ROOF,sdpa,$TRITON" --dtype float32 --tokens 256 --time-limit 60
    bench throughput tf32 --model MDTv2_XL_2 --batch 32 --dtype float32 --lengths 2 \
        --providers reference,fast,fast-graphs --time-limit 170
    run tune_tf32 "$PYTHON" bench/tune.py --json "$OUT/tune.jsonl" --ops rel_attention --dtype tf32 --time-limit 200
}
host() { # the host's time per step, with kernels that take next to none
    bench throughput host --model narrow --batch 2 --mode train --dtype bfloat16 \
        --providers reference,fast,fast-blocks-compiled,fast-graphs --time-limit 200
}
compiled() { # block by block, at a minute and a half per provider on a slow host
    bench throughput xl2_compiled --model MDTv2_XL_2 --batch 32 --mode train --dtype bfloat16 \
        --providers "$COMPILED,fast-graphs" --time-limit 420
}
compiled4() {
    bench throughput xl2_compiled4 --model MDTv2_XL_2 --batch 4 --mode train --dtype bfloat16 \
        --providers "$COMPILED,fast-graphs" --time-limit 420
}
whole() { # the whole reference compiled, which takes more than six minutes on a slow host
    bench throughput xl2_whole --model MDTv2_XL_2 --batch 32 --mode train --dtype bfloat16 \
        --providers reference,reference-compiled,fast-graphs --lengths 2 --time-limit 420
}
FLOAT8=fast-graphs,fast-float8-graphs
float8() { # XL/2 in training, next to the fastest without float8 (batch 128 one by one, for memory); sampling; ops
    local step=(--model MDTv2_XL_2 --dtype bfloat16) lean=${FLOAT8//fast-/fast-lean-}
    run float8_ahead timeout -k 5 60 "$PYTHON" bench/ahead.py --device cuda "${step[@]}" --lengths 2 --batch 32 \
        --providers "$FLOAT8,$lean"
    bench throughput float8_128 "${step[@]}" --batch 128 --mode train --lengths 2 --apart --providers "$lean,$FLOAT8" \
        --time-limit 110
    bench throughput float8_32 "${step[@]}" --batch 32 --mode train --lengths 2 --providers "reference,$FLOAT8" \
        --time-limit 50
    bench throughput float8_32_lean "${step[@]}" --batch 32 --mode train --lengths 2 --providers "reference,$lean" \
        --time-limit 50
    bench throughput float8_sample "${step[@]}" --batch 32,4 --mode sample --providers "reference,$FLOAT8" --time-limit 50
    rows kernels kernels --model XL --dtype bfloat16 --providers fast,float8,eager --time-limit 60 \
        --ops quantize_rows,quantize_weight,linear,ln_modulate_linear,gate_residual_ln_modulate_linear,gelu_linear
}
precisions() { # bfloat16 weights and moments; then float8 by torchao, whose compilation takes a minute or more
    bench throughput xl2_precisions --model MDTv2_XL_2 --batch 32 --mode train --dtype bfloat16 --lengths 4 \
        --providers reference,reference-blocks-compiled,fast-graphs,fast-lean,fast-lean-graphs,fast-lean-in-turn \
        --time-limit 260
    bench throughput xl2_torchao --model MDTv2_XL_2 --batch 32 --mode train --dtype bfloat16 --lengths 4 \
        --providers reference,fast-float8-torchao-graphs,fast-float8-torchao-blocks-compiled --time-limit 200
}
official() {
    if [[ -z $OFFICIAL ]]; then
        echo "no checkout of the official code given (OFFICIAL=PATH)"
        worst=skipped
        return
    fi
    bench throughput official --model MDTv2_XL_2 --batch 4,32 --mode train --dtype float32,bfloat16 \
        --providers reference,fast,official --official "$OFFICIAL" --time-limit 400
}
account() { # a training step, switch by switch
    rows throughput account --account --model MDTv2_S_2,MDTv2_XL_2 --batch 4,32 --dtype bfloat16
}
training() { # what surrounds a step: loader, encoding, training loop, checkpoints
    local parts=loader,step,save
    ! "$PYTHON" -c 'import diffusers' 2>/dev/null || parts=encode,$parts
    rows training training --parts "$parts" --repeats 7
    rows training training --parts step --preset mdtv2-xl2 --batch 32 --repeats 5
    rows training training --parts save --preset mdtv2-b2 --batch 32 --repeats 5
}
breakdown() { # by class of kernel; the reference runs separately for lack of memory
    local step=(--breakdown --model MDTv2_XL_2 --dtype bfloat16)
    rows throughput breakdown "${step[@]}" --batch 32 --mode train --providers fast,fast-graphs
    rows throughput breakdown "${step[@]}" --batch 128 --mode train --providers fast-graphs
    rows throughput breakdown "${step[@]}" --batch 32 --mode train --providers reference
    rows throughput breakdown "${step[@]}" --batch 32 --mode sample --providers fast,reference
}
switches() { # variants and a switch of the fast model, as graphs, so that steps do not wait for the host
    local step=(--breakdown --model MDTv2_XL_2 --dtype bfloat16 --mode train --providers fast-graphs)
    rows throughput switches "${step[@]}" --batch 32,128
    rows throughput switches "${step[@]/fast-graphs/fast-lean-graphs}" --batch 32,128
    rows throughput switches "${step[@]/fast-graphs/fast-in-turn-graphs}" --batch 32,128
    rows throughput switches "${step[@]}" --batch 32,128 --turn recompute
}
sampling() { # what makes it fast, item by item
    rows throughput sampling --account --mode sample --model MDTv2_S_2,MDTv2_XL_2,DiT_XL_2 --batch 1,32 \
        --dtype bfloat16 --providers reference,reference-blocks-compiled,fast --time-limit 420
}
sampling_compiled() {
    bench throughput sampling_compiled --model MDTv2_XL_2 --batch 1,32 --mode sample --dtype bfloat16 \
        --providers "$COMPILED" --time-limit 420
}
tune() { # resumes; write the winners yourself: bench/tune.py --report --write
    run tune_attention "$PYTHON" bench/tune.py --json "$OUT/tune.jsonl" --ops rel_attention --time-limit 220
    run tune_rows "$PYTHON" bench/tune.py --json "$OUT/tune.jsonl" --time-limit 220
}
learning() { # resumes: completed learners are kept
    run learning "$PYTHON" bench/convergence.py --size gpu --study models,float8 --device cuda \
        --out "$OUT/learning" --json "$OUT/learning.jsonl"
}
report() {
    run report "$PYTHON" bench/report.py --plots "$OUT" "$OUT"/*.jsonl
    run goals "$PYTHON" bench/report.py --goals "$OUT"/*.jsonl
}

first() { # the minimum for an overview: tests, breakdown of XL/2's step, attention, every op
    build
    gpu_tests first_tests tests/test_gpu.py tests/test_gpu_[a-s]*.py tests/test_gpu_tokens.py tests/test_gpu_training.py
    breakdown
    bench attention first_attention --providers "$ROOF,sdpa,$TRITON" --dtype bfloat16 --tokens 256 \
        --head-dim 64,72 --time-limit 60
    bench kernels first_kernels --model XL --dtype bfloat16 --providers fast,eager --time-limit 60
}

survey() { # every model, batch and mode; S/2 compiled and switch by switch; its parts are stages as well
    for part in "${PARTS[@]}"; do "$part"; done
}
STEP=(--dtype bfloat16 --lengths 2 --repeats 6 --mode)
GRAPHS=reference,fast,fast-graphs,fast-lean-graphs
survey_ahead() { # compile Triton's kernels on all cores first; batch 128 needs the same ones as batch 32
    run survey_ahead timeout -k 5 100 "$PYTHON" bench/ahead.py --device cuda --dtype bfloat16 --lengths 2 --batch 4,32 \
        --model MDTv2_XL_2,MDTv2_L_2,MDTv2_B_2,MDTv2_S_2 --providers "$GRAPHS"
}
survey_large() {
    bench throughput survey_large "${STEP[@]}" train --model MDTv2_XL_2,MDTv2_L_2 --batch 32,4 \
        --providers "$GRAPHS" --time-limit 110
}
survey_128() { # one provider at a time, to fit into memory
    bench throughput survey_128 "${STEP[@]}" train --model MDTv2_XL_2,MDTv2_L_2 --batch 128 \
        --providers "$GRAPHS" --apart --time-limit 70
}
survey_small() {
    bench throughput survey_small "${STEP[@]}" train --model MDTv2_S_2,MDTv2_B_2 --batch 4,32,128 \
        --providers "$GRAPHS" --time-limit 60
}
survey_sample() {
    bench throughput survey_sample "${STEP[@]}" sample --model MDTv2_XL_2,MDTv2_L_2,MDTv2_B_2,MDTv2_S_2 \
        --batch 4,32,128 --providers "$GRAPHS" --time-limit 70
}
survey_compiled() {
    bench throughput survey_compiled "${STEP[@]}" train --model MDTv2_S_2 --batch 4 --providers "$COMPILED" \
        --time-limit 45
}
survey_switches() {
    run survey_switches "$PYTHON" bench/throughput.py --device cuda --json "$OUT/account.jsonl" \
        --account --model MDTv2_S_2 --batch 32 --dtype bfloat16
}

failed=0
summary=()
for stage in "${asked[@]}"; do
    began=$SECONDS ends=$((SECONDS + LIMIT)) worst=0
    "$stage"
    case $worst in
    0) said=passed ;;
    skipped) said=skipped ;;
    124 | 137) said="out of time: what it measured is kept, run it again" failed=1 ;;
    *) said="FAILED (exit code $worst)" failed=1 ;;
    esac
    summary+=("$(printf '%-18s %4d s  %s' "$stage" $((SECONDS - began)) "$said")")
done
printf '\n== summary (rows and logs: %s)\n' "$OUT"
printf '%s\n' "${summary[@]}"
exit $failed
