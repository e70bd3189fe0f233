// dX = dY · W + mask ⊙ (dS · A) on tensor cores; dS holds the scaling already.
//
// The depth is N, so no sum belongs to one block of the codec: the tile holds what dequantization gives, and ldmatrix
// reads it transposed.
#include "common/gemm.cuh"
#include "common/matrix.cuh"

constexpr int GRAIN = 32;
using Tile = WeightTile<DEPTH, FL_TILE_N, GRAIN, true>;

// Multiplies the sums by the mask of dX [m, k], by way of shared memory, where one draw serves four columns.
FL_DEVICE void mask(const Layout<Tile>& layout, const Dropout& dropout, i64 m, i64 k, WarpSums& sums) {
    each_run(stage(layout, sums), m, k, [&](float* run, i64 row, i64 col) {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            u32 words[4];
            dropout.words(row, col / 4 + group, words);
            auto* four = reinterpret_cast<Vec<float, 4>*>(run) + group;
            auto values = load(four);
#pragma unroll
            for (int i = 0; i < 4; ++i) values.at[i] *= words[i] < dropout.threshold ? 0.0f : dropout.keep;
            store(four, values);
        }
    });
    block_barrier();
    const auto* staged = reinterpret_cast<const float*>(layout.base);
    WarpSums::pairs([&](int i, int j, int half, int row, int col) {
        const auto* at = staged + (warp_row() + row) * STAGE_STRIDE + warp_col() + col;
        const auto pair = load(reinterpret_cast<const Vec<float, 2>*>(at));
        sums.at[i][j][2 * half] = pair.at[0], sums.at[i][j][2 * half + 1] = pair.at[1];
    });
    block_barrier();
}

// Adds mask ⊙ (dS · A): as more depth, its sums apart because the mask is for them alone.
FL_DEVICE void add_branch(const Layout<Tile>& layout, const float* ds, const LoraType* a, const Dropout& dropout, i64 m,
                          i64 k, WarpSums& sums) {
    constexpr int STEPS = (FL_RANK < DEPTH ? FL_RANK + 15 : DEPTH) / 16;
    const i64 row = static_cast<i64>(block_y()) * FL_TILE_M, col = static_cast<i64>(block_x()) * FL_TILE_N;
    WarpSums part;
    part.clear();
    for (int first = 0; first < FL_RANK; first += DEPTH) {
        const Dense<float> left{ds, m, FL_RANK};
        const Dense<LoraType> right{a, FL_RANK, k};
        fill_tile<Type, FL_TILE_M, ROW_BYTES, THREADS>(left, row, first, layout.activations(0));
        fill_tile<Type, DEPTH, Tile::TILE_ROW_BYTES, THREADS>(right, first, col, layout.tile(0));
        block_barrier();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            part.add<Type, ALONG, ROW_BYTES, ACROSS, Tile::TILE_ROW_BYTES>(layout.activations(0), warp_row(),
                                                                           layout.tile(0), warp_col(), step);
        block_barrier();
    }
    if (FL_DROPOUT) mask(layout, dropout, m, k, part);
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.at[i][j][e] += part.at[i][j][e];
}

FL_KERNEL(THREADS, 1)
gemm_4bit_backward(const Type* __restrict__ dy, const u8* __restrict__ codes, const void* __restrict__ absmax,
                   const float* __restrict__ nested, const float* __restrict__ offset, const float* __restrict__ ds,
                   const LoraType* __restrict__ a, const u64* __restrict__ seed, Type* __restrict__ dx,
                   float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 n, i64 k, u32 threshold,
                   float keep) {
    const Layout<Tile> layout;
    Tile weight(codes, absmax, nested, offset, n, k);
    const Share share = share_of((n + DEPTH - 1) / DEPTH);
    const i64 first_col = static_cast<i64>(block_x()) * FL_TILE_N;
    const auto depth = [&](int step) { return static_cast<i64>(share.first + step) * DEPTH; };
    WarpSums sums;
    sums.clear();
    walk(
        layout, weight, share.last - share.first,
        [&](int step) {
            copy_activations(dy, m, n, depth(step), layout.activations(step));
            weight.copy_codes(depth(step), first_col, layout.codes(step));
        },
        [&](int step) { weight.fetch_scales(depth(step), first_col); },
        [&](int step) {
#pragma unroll
            for (int i = 0; i < DEPTH / 16; ++i)
                sums.add<Type, ALONG, ROW_BYTES, ACROSS, Tile::TILE_ROW_BYTES>(layout.activations(step), warp_row(),
                                                                               layout.tile(step), warp_col(), i);
        });
    if (FL_RANK > 0 && block_z() == 0)
        add_branch(layout, ds, a, make_dropout<FL_DROPOUT>(seed, threshold, keep), m, k, sums);
    finish(layout, sums, m, k, partial, counters,
           [&](i64 row, i64 col, float (&values)[8]) { store_run(dx + row * k, k, col, values); });
}
