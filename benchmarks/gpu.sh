#!/usr/bin/env bash
# Runs all that needs an NVIDIA card in one go, on a machine that has PyTorch with CUDA, nvcc and pytest:
# builds ExLlamaV2 if it is not there, then its self-test, tests/gpu, and python -m benchmarks gpu.
#
#   benchmarks/gpu.sh [PLACE]        results go to PLACE, or to $OUT, or to gpu-results
#
# Wheels that are missing there lie in .whl (exllamav2, llguidance, tokenizers, marisa_trie, gguf, …) and are put on the
# path. GPU_PYTHON names another interpreter, TURNTABLE_PREBUILT a folder with exllamav2_ext*.so, GPU_STEPS the steps.
set -uo pipefail
here=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
cd -- "$here" || exit 1
out=${1:-${OUT:-gpu-results}}
mkdir -p -- "$out"
python=$(command -v "${GPU_PYTHON:-python3}")
steps=" ${GPU_STEPS:-selftest tests benchmarks} "

site=${TMPDIR:-/tmp}/turntable-gpu-site
export PYTHONPATH=$site:${TURNTABLE_PREBUILT:-}:$here PYTHONUNBUFFERED=1 EXLLAMA_NO_XFORMERS=1
if compgen -G ".whl/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
CPATH=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia/cu13/include:${CPATH:-}
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability(0))') || exit 3
export CPATH TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-16} TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$site-ext}
export TURNTABLE_GPU_PYTHON=$python TURNTABLE_BENCH_DIR=${TURNTABLE_BENCH_DIR:-${TMPDIR:-/tmp}/turntable-bench}

nvidia-smi | tee "$out/nvidia-smi.txt"
SECONDS=0
timeout 560 "$python" -c 'import exllamav2; print("exllamav2 is there")' 2>&1 | tail -n 20 | tee "$out/build.txt"
echo "build or import: $SECONDS s" | tee -a "$out/build.txt"
built=$TORCH_EXTENSIONS_DIR/exllamav2_ext/exllamav2_ext.so
if [[ -f $built && ! -f $out/exllamav2_ext.so.gz ]]; then gzip -1 -c "$built" >"$out/exllamav2_ext.so.gz"; fi

if [[ $steps == *" selftest "* ]]; then
    timeout 300 "$python" -m modules.engines.selftest exllamav2 2>"$out/selftest.err" | tee "$out/selftest.jsonl"
fi
if [[ $steps == *" tests "* ]]; then
    timeout "${GPU_TESTS_S:-400}" "$python" -m pytest -q tests/gpu -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -n 40
fi
if [[ $steps == *" benchmarks "* ]]; then
    # INT, not TERM: it prints the table as far as it got.
    timeout --signal=INT --kill-after=30 "${GPU_BENCH_S:-500}" "$python" -m benchmarks gpu --json "$out/gpu.json" 2>&1 | tee "$out/benchmarks.txt" | tail -n 40
fi
