# Every task a person needs; `just` lists them. `just` itself: pip install rust-just.

python := env("FERROLORA_PYTHON", ".venv/bin/python")

# list the tasks
default:
    @just --list

# make .venv with everything a developer needs, and ferrolora editable in it
setup:
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet uv
    .venv/bin/python -m uv pip install --python .venv/bin/python --constraint .ci/constraints.txt --group dev --editable ".[all]"

# rebuild the native module into .venv (release)
build:
    {{ python }} -m maturin develop --release --quiet

# all tests on what is in .venv; arguments go to pytest
test *arguments:
    FERROLORA_PYTHON={{ python }} sh tests/run {{ arguments }}

# format Rust and Python
format:
    cargo fmt --all
    {{ python }} -m ruff format .
    {{ python }} -m ruff check --fix --quiet .

# every lint and structural check
lint:
    cargo fmt --all --check
    cargo clippy --quiet --workspace --all-targets -- -D warnings
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .
    {{ python }} -m mypy --cache-dir target/mypy python/ferrolora
    {{ python }} -m mypy.stubtest --mypy-config-file pyproject.toml ferrolora._native
    {{ python }} .ci/check_layers.py
    {{ python }} .ci/check_sizes.py
    {{ python }} .ci/check_generated.py

# the portable wheel: abi3, glibc 2.28, into target/wheels/portable (maturin and ziglang on PATH)
wheel:
    rm -rf target/wheels/portable
    maturin build --quiet --release --zig --compatibility manylinux_2_28 --out target/wheels/portable
    @ls -l target/wheels/portable

# the table of targets and the train steps against torch, bitsandbytes and PEFT, and the pages made from them
bench:
    {{ python }} -m ferrolora bench --suite targets --threads 2 --json benches/results/bench-targets.json --overwrite
    {{ python }} -m ferrolora bench --suite train --threads 2 --json benches/results/bench-train.json --overwrite
    {{ python }} benches/report.py

# the Rust kernels by themselves, on every instruction set; arguments are parts of names
bench-rust *arguments:
    cargo bench --quiet --package ferrolora-core --benches -- {{ arguments }}

# the golden vectors, from bitsandbytes
golden:
    {{ python }} tests/golden/make_golden.py

# the exact versions CI installs
constraints:
    uv pip compile --quiet --upgrade --no-annotate --custom-compile-command "just constraints" --python-version 3.11 \
        --extra all --group dev --output-file .ci/constraints.txt pyproject.toml
    uv pip compile --quiet --upgrade --no-annotate --custom-compile-command "just constraints" --python-version 3.10 \
        --resolution lowest-direct --extra all --output-file .ci/constraints-lowest.txt pyproject.toml

# API documentation of the Rust core
docs:
    cargo doc --no-deps --package ferrolora-core

# everything CI runs
ci:
    .ci/run
