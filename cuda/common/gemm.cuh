// The product of 16-bit activations [M, depth] with a decoded 4-bit weight, for gemm_4bit.cu and gemm_4bit_backward.cu.
//
// The depth is walked in steps of 64. A step's activations and codes come by cp.async into a ring of FL_STAGES slots;
// the codes are decoded one step ahead into one of two 16-bit tiles, while the tensor cores multiply the other: one
// barrier a step. Forward and backward read the same bytes of the weight in the same order of rows; they differ in
// which dimension is the depth, hence in how ldmatrix reads the decoded tile.
//
//   iteration j:   codes of step j + FL_STAGES - 1 asked for | step j + 1 decoded | step j multiplied
#pragma once
#include "decode.cuh"
#include "scales.cuh"
#include "split.cuh"
#include "tile.cuh"

using Type = FL_TYPE;
using LoraType = FL_LORA_TYPE;
using Codec = FL_CODEC;

constexpr int DEPTH = 64;
constexpr int THREADS = 32 * FL_WARPS_M * FL_WARPS_N;
constexpr int WARP_M = FL_TILE_M / FL_WARPS_M, WARP_N = FL_TILE_N / FL_WARPS_N; // outputs of a warp
constexpr int ROW_BYTES = 2 * DEPTH; // of a tile whose rows run along the depth
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp has whole products");
static_assert(FL_STAGES >= 3, "one step is multiplied, one decoded and at least one on its way");

// The part of the weight that one step reads: ROWS rows of W by COLS columns, a scale for every GRAIN of a row.
// Forward: FL_TILE_N × 64, backward: 64 × FL_TILE_N.
template <int Rows, int Cols, int Grain, bool Exact> struct WeightTile {
    static constexpr int ROWS = Rows;
    static constexpr int CODE_BYTES = Rows * Cols / 2; // of a slot
    static constexpr int TILE_ROW_BYTES = 2 * Cols;    // decoded
    static constexpr int TILE_BYTES = Rows * TILE_ROW_BYTES;
    static constexpr int GRAINS = Cols / Grain;
    static constexpr int SCALES = Rows * GRAINS; // of a step, [grain][row]
    static constexpr int HELD = (SCALES + THREADS - 1) / THREADS;
    using Source = Scales<FL_NESTED>;

    const u8* codes;
    Source source;
    i64 n, k;
    typename Source::Raw held[HELD]; // scales on their way to shared memory

    FL_DEVICE WeightTile(const u8* packed, const void* absmax, const float* nested, const float* offset, i64 rows,
                         i64 cols)
        : codes(packed), source(absmax, nested, offset), n(rows), k(cols) {}

    // Asks for the codes at (row, col), 16 bytes a copy; zeros outside the weight.
    FL_DEVICE void copy_codes(i64 row, i64 col, u8* slot) const {
        constexpr int CHUNKS = Cols / 32; // of a row
        for (int i = thread_x(); i < Rows * CHUNKS; i += THREADS) {
            const i64 r = row + i / CHUNKS, c = col + i % CHUNKS * 32;
            const bool inside = r < n && c < k;
            cp_async_16(slot + 16 * i, codes + (inside ? (r * k + c) / 2 : 0), inside ? 16 : 0);
        }
    }

    FL_DEVICE void fetch_scales(i64 row, i64 col) {
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int i = thread_x() + h * THREADS;
            const i64 r = min_of(row + i % Rows, n - 1), c = min_of(col + i / Rows * Grain, k - Grain);
            if (i < SCALES) held[h] = source.from((r * k + c) / FL_BLOCK_SIZE).fetch(0);
        }
    }
    FL_DEVICE void store_scales(float* scales) const {
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int i = thread_x() + h * THREADS;
            if (i < SCALES) store(scales + i, source.from(0).finish(held[h]));
        }
    }

    // Codes of a slot to 16-bit values: of the table alone, or times their scale.
    FL_DEVICE static void decode(const u8* slot, const float* scales, u8* tile) {
        constexpr int WORDS = Cols / 8; // of a row
#pragma unroll 4
        for (int i = thread_x(); i < Rows * WORDS; i += THREADS) {
            const u32 word = load(reinterpret_cast<const u32*>(slot) + i);
            const int row = i / WORDS, chunk = i % WORDS;
            u32 out[4];
            if (Exact)
                decode8_exact<Codec, Type>(word, load(scales + chunk * 8 / Grain * Rows + row), out);
            else
                decode8<Codec, Type>(word, out);
            store(reinterpret_cast<Words4*>(tile + chunk_offset<TILE_ROW_BYTES>(row, chunk)),
                  Words4{{out[0], out[1], out[2], out[3]}});
        }
    }
};

// Where things lie in the block's dynamic shared memory.
template <class W> struct Layout {
    static constexpr int SLOT = FL_TILE_M * ROW_BYTES + W::CODE_BYTES;
    static constexpr int BYTES = FL_STAGES * SLOT + 2 * W::TILE_BYTES + 3 * W::SCALES * 4;
    u8* base = dynamic_shared();

    FL_DEVICE u8* activations(int step) const { return base + step % FL_STAGES * SLOT; }
    FL_DEVICE u8* codes(int step) const { return activations(step) + FL_TILE_M * ROW_BYTES; }
    FL_DEVICE u8* tile(int step) const { return base + FL_STAGES * SLOT + step % 2 * W::TILE_BYTES; }
    FL_DEVICE float* scales(int step) const {
        return reinterpret_cast<float*>(base + FL_STAGES * SLOT + 2 * W::TILE_BYTES) + step % 3 * W::SCALES;
    }
};

// Asks for 64 columns from `col` of the block's rows of the activations [m, depth]; depth is a multiple of 8.
FL_DEVICE void copy_activations(const Type* x, i64 m, i64 depth, i64 col, u8* slot) {
    for (int i = thread_x(); i < FL_TILE_M * 8; i += THREADS) {
        const i64 row = static_cast<i64>(block_y()) * FL_TILE_M + i / 8, c = col + i % 8 * 8;
        const bool inside = row < m && c < depth;
        cp_async_16(slot + chunk_offset<ROW_BYTES>(i / 8, i % 8), x + (inside ? row * depth + c : 0), inside ? 16 : 0);
    }
}

// Walks `count` steps. copy(step) asks for a step's bytes, fetch(step) for its scales, multiply(step) adds its product;
// all count from 0.
template <class W, class Copy, class Fetch, class Multiply>
FL_DEVICE void walk(const Layout<W>& layout, W& weight, int count, const Copy& copy, const Fetch& fetch,
                    const Multiply& multiply) {
    for (int step = 0; step < FL_STAGES - 1; ++step) {
        if (step < count) copy(step);
        cp_async_commit();
    }
    for (int step = 0; step < 2 && step < count; ++step) {
        fetch(step);
        weight.store_scales(layout.scales(step));
    }
    if (2 < count) fetch(2);
    cp_async_wait<FL_STAGES - 2>();
    block_barrier();
    if (0 < count) W::decode(layout.codes(0), layout.scales(0), layout.tile(0));
    for (int step = 0; step < count; ++step) {
        cp_async_wait<FL_STAGES - 3>(); // step + 1 is here
        block_barrier();                // and step is decoded; nobody still reads what follows overwrites
        if (step + FL_STAGES - 1 < count) copy(step + FL_STAGES - 1);
        cp_async_commit();
        if (step + 2 < count) weight.store_scales(layout.scales(step + 2));
        if (step + 3 < count) fetch(step + 3);
        if (step + 1 < count) W::decode(layout.codes(step + 1), layout.scales(step + 1), layout.tile(step + 1));
        multiply(step);
    }
    cp_async_wait<0>();
    block_barrier();
}

using WarpSums = Sums<WARP_M / 16, WARP_N / 8>;

// First row and column of the warp in the block's tile.
FL_DEVICE int warp_row() { return thread_x() / 32 / FL_WARPS_N * WARP_M; }
FL_DEVICE int warp_col() { return thread_x() / 32 % FL_WARPS_N * WARP_N; }

// The block's tile of sums in shared memory, over the slots and tiles, where all threads reach all of it: element
// (row, col) at row · STAGE_STRIDE + col.
constexpr int STAGE_STRIDE = FL_TILE_N + 8; // a half-warp's pairs fall into all banks
template <class W> FL_DEVICE float* stage(const Layout<W>& layout, const WarpSums& sums) {
    static_assert(FL_TILE_M * STAGE_STRIDE * 4 <= Layout<W>::BYTES, "the sums fit");
    auto* staged = reinterpret_cast<float*>(layout.base);
    WarpSums::pairs([&](int i, int j, int half, int row, int col) {
        const Vec<float, 2> pair{{sums.at[i][j][2 * half], sums.at[i][j][2 * half + 1]}};
        store(reinterpret_cast<Vec<float, 2>*>(staged + (warp_row() + row) * STAGE_STRIDE + warp_col() + col), pair);
    });
    block_barrier();
    return staged;
}

// Calls use(staged, row, col) for every run of eight elements of the output [rows, cols] in the block's tile.
template <class Use> FL_DEVICE void each_run(float* staged, i64 rows, i64 cols, const Use& use) {
    constexpr int RUNS = FL_TILE_N / 8; // of a row
#pragma unroll 1
    for (int i = thread_x(); i < FL_TILE_M * RUNS; i += THREADS) {
        const i64 row = static_cast<i64>(block_y()) * FL_TILE_M + i / RUNS;
        const i64 col = static_cast<i64>(block_x()) * FL_TILE_N + i % RUNS * 8;
        if (row < rows && col < cols) use(staged + i / RUNS * STAGE_STRIDE + i % RUNS * 8, row, col);
    }
}

// Calls write(row, col, sums) for every run of eight of the output [rows, cols] that this block is the one to finish.
template <class W, class Write>
FL_DEVICE void finish(const Layout<W>& layout, const WarpSums& sums, i64 rows, i64 cols, float* partial, u32* counters,
                      const Write& write) {
    float* staged = stage(layout, sums);
    const Parts parts{partial, rows * cols};
    if (grid_z() > 1) {
        each_run(staged, rows, cols, [&](const float* run, i64 row, i64 col) {
            float values[8];
            load8(run, values);
            store_run(parts.mine() + row * cols, cols, col, values);
        });
        if (!adds_up(counters)) return;
    }
    each_run(staged, rows, cols, [&](const float* run, i64 row, i64 col) {
        float values[8];
        if (grid_z() > 1)
            parts.sum_run(row, cols, col, values);
        else
            load8(run, values);
        write(row, col, values);
    });
}
