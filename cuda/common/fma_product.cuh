// C[i, j] = Σ_d A(i, d) · B(d, j) with float32 multiply-adds: a 64×64 tile of C a block of 256 threads, 4×4 a thread.
#pragma once
#include "matrix.cuh"
#include "split.cuh"

constexpr int FMA_THREADS = 256;
constexpr int FMA_TILE = 64;
constexpr int FMA_DEPTH = 32;
constexpr int FMA_STRIDE = FMA_TILE + 4; // words; keeps rows 16-byte aligned and off each other's banks

// Whether the lines of an operand's matrix run along the depth: element (i, d) is then matrix[i][d], else matrix[d][i].
enum Layout { ALONG_DEPTH, ACROSS_DEPTH };

// Copies elements (first .. first + 64, d .. d + 32) of an operand to tile [d][i].
template <Layout L, class Matrix> FL_DEVICE void load_tile(const Matrix& matrix, i64 first, i64 d, float* tile) {
    float values[8];
    if (L == ALONG_DEPTH) {
        const int i = thread_x() / 4, part = thread_x() % 4 * 8;
        matrix.run(first + i, d + part, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) store(tile + (part + j) * FMA_STRIDE + i, values[j]);
    } else {
        const int line = thread_x() / 8, part = thread_x() % 8 * 8;
        matrix.run(d + line, first + part, values);
        store8(tile + line * FMA_STRIDE + part, values);
    }
}

// Room for a tile of each operand.
FL_DEVICE float* operand_tiles() {
    FL_SHARED(float, tiles, 2 * FMA_DEPTH * FMA_STRIDE);
    return tiles;
}

// The block's tile of C.
struct FmaTile {
    float sums[4][4] = {};
    i64 first_row, first_col;

    FL_DEVICE FmaTile()
        : first_row(static_cast<i64>(block_y()) * FMA_TILE), first_col(static_cast<i64>(block_x()) * FMA_TILE) {}
    FL_DEVICE i64 row(int i) const { return first_row + thread_x() / 16 * 4 + i; }
    FL_DEVICE i64 col(int j) const { return first_col + thread_x() % 16 * 4 + j; }

    // Adds the product over depth [32 · share.first, 32 · share.last).
    template <Layout LA, Layout LB, class A, class B> FL_DEVICE void accumulate(const A& a, const B& b, Share share) {
        float* tile_a = operand_tiles();
        float* tile_b = tile_a + FMA_DEPTH * FMA_STRIDE;
        const float* mine_a = tile_a + thread_x() / 16 * 4;
        const float* mine_b = tile_b + thread_x() % 16 * 4;
        for (int step = share.first; step < share.last; ++step) {
            block_barrier();
            load_tile<LA>(a, first_row, static_cast<i64>(step) * FMA_DEPTH, tile_a);
            load_tile<LB>(b, first_col, static_cast<i64>(step) * FMA_DEPTH, tile_b);
            block_barrier();
#pragma unroll 8
            for (int d = 0; d < FMA_DEPTH; ++d) {
                const auto left = load(reinterpret_cast<const Vec<float, 4>*>(mine_a + d * FMA_STRIDE));
                const auto right = load(reinterpret_cast<const Vec<float, 4>*>(mine_b + d * FMA_STRIDE));
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += left.at[i] * right.at[j];
            }
        }
    }

    // Calls write(row, col, sum) for the thread's elements of C [rows, cols], in the one block that has the whole sum.
    template <class Write>
    FL_DEVICE void finish(i64 rows, i64 cols, float* partial, u32* counters, const Write& write) {
        const Parts parts{partial, rows * cols};
        if (grid_z() > 1) {
            each(rows, cols, [&](i64 row, i64 col, float sum) { parts.put(row * cols + col, sum); });
            if (!adds_up(counters)) return;
        }
        each(rows, cols,
             [&](i64 row, i64 col, float sum) { write(row, col, grid_z() > 1 ? parts.sum(row * cols + col) : sum); });
    }

    template <class F> FL_DEVICE void each(i64 rows, i64 cols, const F& f) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (row(i) < rows && col(j) < cols) f(row(i), col(j), sums[i][j]);
    }
};

// Steps of a depth.
FL_DEVICE i64 fma_steps(i64 depth) { return (depth + FMA_DEPTH - 1) / FMA_DEPTH; }
FL_DEVICE Share whole_depth(i64 depth) { return Share{0, static_cast<int>(fma_steps(depth))}; }
