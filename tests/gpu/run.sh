#!/usr/bin/env bash
# Checks and measures MTP on one GPU, from the unpacked kit alone: docs/gpu.md.
#
#     bash run.sh [OUT]        results in OUT, else $OUT, else ./out
#
# A step has its own time limit, all together have GPU_KIT_SECONDS (480). Results are written after every step, so that a
# run that is killed leaves what it has. Without a GPU the same steps run on the CPU with next to nothing to do.
set -ua  # -a: steps are shells of their own, which need functions and variables
unset CMAKE_ARGS
kit=$(cd "$(dirname "$0")" && pwd)
out=${1:-${OUT:-$PWD/out}}
total=${GPU_KIT_SECONDS:-480}
# Weights of 20 GB are made there; in memory where it is large enough.
work=${GPU_KIT_WORK:-}
if [ -z "$work" ]; then
    free=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')
    if [ "${free:-0}" -gt 40000000 ]; then parent=/dev/shm; else parent=${TMPDIR:-/tmp}; fi
    work=$(mktemp -d "$parent/gpu-kit.XXXXXX") || exit 1
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$out" "$work/steps" || exit 1
begun=$SECONDS
failures=0 skipped=0
: > "$out/log.txt"

now() { echo $((SECONDS - begun)); }

# Text as a JSON string.
quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\010\013-\037' | tr '\n\t' '  ' | sed 's/\\/\\\\/g; s/"/\\"/g')"; }

# step NAME SECONDS COMMAND...: run it, note how it went. Status 77 means skipped; the last line said is the reason. A
# command may leave figures, a JSON object, in $figures.
step() {
    local name=$1 limit=$2 status=passed reason="" code begin left
    shift 2
    left=$((total - $(now)))
    [ "$left" -lt "$limit" ] && limit=$left
    figures=$work/steps/$name.figures
    begin=$(now)
    if [ "$limit" -lt 3 ]; then
        status=skipped reason="no time was left"
    else
        timeout -k 5 "$limit" bash -c '"$@"' step "$@" > "$work/said" 2>&1 < /dev/null
        code=$?
        reason=$(grep -v '^ *$' "$work/said" | tail -n 1 | sed 's/\x1b\[[0-9;]*m//g' | cut -c1-300)
        case $code in
            0) ;;
            77) status=skipped ;;
            124 | 137) status=killed reason="at its limit of $limit s: $reason" ;;
            *) status=failed reason="status $code: $reason" ;;
        esac
    fi
    case $status in failed | killed) failures=$((failures + 1)) ;; skipped) skipped=$((skipped + 1)) ;; esac
    printf '{"step": "%s", "status": "%s", "seconds": %d, "said": %s, "figures": ' \
        "$name" "$status" $(($(now) - begin)) "$(quoted "$reason")" > "$work/step"
    if [ -s "$figures" ]; then cat "$figures" >> "$work/step"; else printf 'null' >> "$work/step"; fi
    printf '}' >> "$work/step"
    mv "$work/step" "$work/steps/$(printf '%02d' "$(ls "$work/steps" | grep -c 'json$')")-$name.json"
    { echo "== $name: $status, $(now) s"; tail -c 60000 "$work/said" 2>/dev/null; } >> "$out/log.txt"
    printf '%-22s %-8s %4d s  %s\n' "$name" "$status" $(($(now) - begin)) "$reason" | tee -a "$work/table"
    results
}

results() {
    local separator="" file
    {
        printf '{"kit": %s, "dry": %s, "gpu": %s, "seconds": %d, "failures": %d, "steps": [' \
            "$(cat "$kit/kit.json")" "$dry" "$(quoted "$gpu")" "$(now)" "$failures"
        for file in "$work"/steps/*.json; do printf '%s\n' "$separator"; cat "$file"; separator=,; done
        printf '\n]}\n'
    } > "$work/results.json" && mv "$work/results.json" "$out/results.json"
    { cat "$work/table"; [ -n "$python" ] && "$python" -S "$kit/tests/table.py" "$out/results.json"; } > "$out/table.txt" 2>&1
}

skip() { echo "$*"; return 77; }

# --- what is here

find_python() {  # the first that can run ours
    local each
    local everywhere="python3.13 python3.12 python3.11 /opt/*/.venv/bin/python3 /opt/*/bin/python3 /usr/bin/python3"
    for each in "${GPU_KIT_PYTHON:-python3}" ${GPU_KIT_SEARCH-$everywhere}; do
        each=$(command -v "$each" 2>/dev/null) || continue
        "$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && "$each" -c 'import numpy' 2>/dev/null \
            && { echo "$each"; return; }
    done
}

devices() {
    local each
    uname -srm; grep -m1 'model name' /proc/cpuinfo; nproc; free -g 2>/dev/null | sed -n 2p; df -h "$work" | tail -1
    for each in "nvcc --version" "cmake --version" "ninja --version" "python3 --version"; do
        if command -v "${each%% *}" > /dev/null; then $each 2>&1 | tail -n 1; else echo "${each%% *}: not here"; fi
    done
    ldd --version 2>&1 | head -n 1
    [ "$dry" = false ] || skip "no GPU, $gpu: the steps below run on the CPU, in small" || return
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,power.limit --format=csv,noheader
}

# Where the machine may have cuBLAS, which libggml-cuda asks for by name, and the driver, if the loader does not look there.
cuda_folders() {
    ls -d /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/local/cuda*/lib64 /usr/local/cuda*/targets/x86_64-linux/lib 2>/dev/null
    [ -n "$python" ] && "$python" -c 'import nvidia.cu13 as c; print(list(c.__path__)[0] + "/lib")' 2>/dev/null
}

# --- the programs: as packed, with our copies of the compiler's libraries, or compiled here

# Whether the programs find every library, in a version that will do. The driver's is missing where there is no GPU.
starts() {
    local missing
    missing=$(ldd "$1"/*.so "$1"/llama-server "$1"/test-backend-ops 2>&1 | grep 'not found' | grep -v libcuda | sort -u)
    [ -z "$missing" ] && "$1/llama-server" --version && return
    echo "$missing" | head -n 5
    return 1
}

loading="import ctypes; [ctypes.CDLL('./libggml-' + name + '.so') for name in ('base', 'cuda')]"
sees_gpu() { "$1/llama-server" --list-devices 2>&1 | grep 'CUDA0'; }

programs() {
    if starts "$bin/ours"; then
        :
    elif LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$bin/fallback starts "$bin/ours"; then
        touch "$work/fallback"
        LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$bin/fallback
        echo "with the kit's copies of the compiler's libraries"
    else
        compile
        return
    fi
    if [ "$dry" = true ] || sees_gpu "$bin/ours"; then
        echo "as packed"
        return
    fi
    echo "llama.cpp does not see the GPU:"
    ldd "$bin/ours/libggml-cuda.so" 2>&1 | grep 'not found\|No such'
    [ -n "$python" ] && (cd "$bin/ours" && "$python" -c "$loading" 2>&1 | tail -n 1)
    compile
}

compile() {  # ours for this GPU, from the packed sources
    local tool
    [ -d "$kit/source" ] || { echo "this kit has no sources; make gpu-kit where there is no nvcc packs them"; return 1; }
    for tool in c++ cmake python3 nvcc; do
        command -v $tool > /dev/null || { echo "to be compiled here, but there is no $tool"; return 1; }
    done
    python3 "$kit/tests/gpu_cuda.py" "$kit/source" "$work/compiled" || return
    cp "$work/compiled/libggml-cuda.so" "$bin/stock/" && touch "$work/ready" || return
    sees_gpu "$work/compiled" && echo "compiled here"
}

# --- llama-server without Python: HTTP by bash alone

ask() {  # PORT PROMPT: the text of a greedy answer
    local body answer
    body="{\"prompt\": \"$2\", \"n_predict\": 64, \"temperature\": 0, \"cache_prompt\": false}"
    exec 3<> "/dev/tcp/127.0.0.1/$1" || return
    printf 'POST /completion HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' "${#body}" "$body" >&3
    answer=$(cat <&3); exec 3>&-
    printf '%s' "$answer" | sed -n 's/.*"content":"\(\([^"\\]\|\\.\)*\)".*/\1/p'
    printf '%s' "$answer" | grep -oE '"(draft_n|draft_n_accepted|predicted_per_second)":[0-9.]+' >> "$work/timings" || :
}

answers() {  # FILE ARGUMENTS...: answers of llama-server started so
    local file=$1 log=$work/server.log port="" pid prompt i
    shift
    "$ours/llama-server" -m "$kit/pair/target.gguf" -ngl 99 -c 2048 -np 1 --port 0 "$@" > "$log" 2>&1 &
    pid=$!
    for i in $(seq 200); do
        port=$(sed -n 's/.*listening on http:\/\/[^:]*:\([0-9]*\).*/\1/p' "$log" | head -n 1)
        [ -n "$port" ] && break
        kill -0 $pid 2>/dev/null || { tail -n 3 "$log"; return 1; }
        sleep 0.1
    done
    : > "$work/timings"
    for prompt in 'def parse_arguments(argv):\n    ' 'import json\nimport os\n\nclass Settings:\n    ' 'def main('; do
        ask "$port" "$prompt"; echo
    done > "$file"
    kill $pid; wait $pid 2>/dev/null
    [ "$(tr -d '\n ' < "$file" | wc -c)" -gt 60 ] || { echo "llama-server said next to nothing"; tail -n 3 "$log"; return 1; }
}

server() {
    answers "$work/plain" --spec-type none || return
    answers "$work/mtp" --spec-draft-model "$kit/pair/drafter.gguf" --spec-type draft-mtp --spec-draft-n-max 3 || return
    cat "$work/timings"
    local same=0 i
    for i in 1 2 3; do [ "$(sed -n ${i}p "$work/plain")" = "$(sed -n ${i}p "$work/mtp")" ] && same=$((same + 1)); done
    printf '{"prompts": 3, "identical": %d, "timings": %s}' $same "$(quoted "$(cat "$work/timings")")" > "$figures"
    grep -q '"draft_n_accepted":[1-9]' "$work/timings" || { echo "no draft was accepted"; return 1; }
    echo "$same of 3 answers are the same with MTP"
    [ $same -ge 2 ]  # a near-tie may part one
}

speed() {  # of the bundled target alone
    "$ours/llama-bench" -m "$kit/pair/target.gguf" -ngl 99 -p 128 -n 64 -r 2 -o json > "$work/speed" || return
    grep -q '^\[' "$work/speed" || { echo "llama-bench printed no result"; return 1; }
    printf '{"llama_bench": ' > "$figures"
    tr -d '\n' < "$work/speed" >> "$figures"
    printf '}' >> "$figures"
    grep -oE '"avg_ts": [0-9.]+' "$work/speed" | paste -sd' '
}

# --- what the ordered head is made of, and what the series changes, against libggml's CPU kernels

operations() {
    local ops=("$ours/test-backend-ops" test -j "$(nproc)") products='type_a=(q4_K|q6_K|q8_0|q4_0|f16|f32),type_b=f32'
    if [ "$dry" = true ]; then
        "${ops[@]}" -b CPU -o TOP_K,TANH || return
    else
        "${ops[@]}" -b CUDA0 -o TOP_K,GET_ROWS,CONT,TANH,GELU,GEGLU || return
        "${ops[@]}" -b CUDA0 -o MUL_MAT_ID,MUL_MAT -p "$products" || return
    fi
    echo "$(grep -oE '[0-9]+/[0-9]+ tests passed' "$work/said" | paste -sd,)"
}

# --- Python

run() { "$python" -P "$@"; }

tests() {  # NAME: tests marked gpu
    [ -n "$python" ] || skip "no Python from 3.11 on that has numpy" || return
    # A libggml without our series looks for its devices in the current folder.
    (cd "$ours" && GPU_KIT_FIGURES=$figures LD_PRELOAD=$preload run -m pytest -q -p no:cacheprovider -W ignore -rs \
        "$kit/tests/test_gpu.py" -k "$1") > "$work/pytest" 2>&1
    local code=$?
    cat "$work/pytest"
    grep -q '^[0-9]* skipped\|^[0-9]* deselected' "$work/pytest" && return 77
    return $code
}

bench() {  # ARGUMENTS: gemma-mtp bench; its last line is one JSON object
    [ "$dry" = true ] || sees_gpu "$ours" || skip "llama.cpp does not see the GPU" || return
    [ -n "$python" ] || skip "no Python from 3.11 on that has numpy" || return
    # Stock's libggml looks for its devices in the current folder.
    (cd "$bin/stock" && run -c 'from gemma_mtp.runtime.cli.main import main; main()' bench "$@") > "$work/bench" 2> "$work/err"
    local code=$?
    sed '$d' "$work/bench"
    cat "$work/err"
    [ $code -eq 0 ] || return $code
    tail -n 1 "$work/bench" | grep '^{.*}$' > "$figures" || { echo "no result was printed"; return 1; }
    echo "measured"
}

profile() {  # FOLDER: graphs and waits of a pair with random weights
    local folder
    folder=$(ls -d "$GEMMA_MTP_CACHE"/shapes/$1-* 2>/dev/null | head -n 1)
    [ -n "$folder" ] || skip "its weights were not made" || return
    GPU_KIT_PAIR=$folder preload=$bin/libcounts.so tests draft_step
}

main() {
    gpu=$(nvidia-smi -L 2>&1 | head -n 1)
    dry=false
    case $gpu in
        GPU\ *) [ "${GPU_KIT_DRY:-0}" = 1 ] && dry=true ;;
        *) dry=true gpu="nvidia-smi lists none" ;;
    esac
    python=$(find_python)
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-$kit/bin/ours}$(cuda_folders | sed 's/^/:/' | tr -d '\n')
    PYTHONPATH=$kit/python PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 GEMMA_MTP_CACHE=$work/cache GEMMA_MTP_CUDA=1
    GPU_KIT_PAIR=$kit/pair
    [ "$dry" = true ] && GPU_KIT_DRY=1
    bin=$kit/bin ours=$kit/bin/ours preload=""
    : > "$work/table"

    step devices 20 devices
    step programs 420 programs
    [ -e "$work/fallback" ] && LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$bin/fallback
    [ -e "$work/ready" ] && ours=$work/compiled
    LLAMA_CPP_LIB_PATH=$ours
    mkdir -p "$GEMMA_MTP_CACHE/stock"
    ln -sfn "$kit/bin/stock" "$GEMMA_MTP_CACHE/stock/$(cat "$kit/stock-key")"

    step tokens 70 tests tokens
    step drafts 40 tests one_call
    step head 40 tests ordered_head
    preload=$bin/libcounts.so step graphs 25 tests draft_step
    step operations 60 operations
    step server 40 server
    step llama-bench 20 speed

    local shape small=() rates=0.35,0.6,0.8,0.95
    local weights=(-q Q4_K_M --drafter-quant Q8_0)
    if [ "$dry" = true ]; then
        small=(--layers 5 -n 4 --repeat 1 --warm-tokens 4 --ctx-filled 16 --draft 2) rates=0.8
        weights=()
    else
        small=(-n 96 --repeat 2 --warm-tokens 192)
    fi
    # A server is started for each case and loads 20 GB each time.
    local beside=("${small[@]}" --against stock)
    [ "$dry" = true ] || beside=(-n 64 --repeat 1 --warm-tokens 64 --against stock)
    for shape in E2B 31B; do
        [ "$dry" = true ] && [ "$shape" = 31B ] && continue  # 1.4 GB of embeddings, whatever the layers
        step "bench-$shape" 110 bench --shape $shape "${weights[@]}" --acceptance $rates "${small[@]}"
        step "profile-$shape" 30 profile $shape
    done
    for shape in 31B E2B; do
        [ "$dry" = true ] && [ "$shape" = 31B ] && continue
        step "bench-$shape-stock" 200 bench --shape $shape "${weights[@]}" --acceptance $rates "${beside[@]}"
    done

    sed '1,/^$/d' "$out/table.txt"
    echo "results in $out: results.json, table.txt, log.txt"
    [ "$failures" -eq 0 ] && { [ "$dry" = true ] || [ "$skipped" -eq 0 ]; }
}

main
