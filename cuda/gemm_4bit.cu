// y = x · Wᵀ + bias + scaling · S · Bᵀ on tensor cores.
//
// FL_EXACT=0: the tile holds values of the table alone, and the sum over each block of the codec is scaled in float32.
// FL_EXACT=1: the tile holds what dequantization gives.
#include "common/gemm.cuh"
#include "common/matrix.cuh"

using BiasType = FL_BIAS_TYPE;
constexpr int GRAIN = FL_BLOCK_SIZE < DEPTH ? FL_BLOCK_SIZE : DEPTH;
using Tile = WeightTile<FL_TILE_N, DEPTH, GRAIN, FL_EXACT>;

// Adds the product of one step.
FL_DEVICE void multiply_step(const u8* x, const u8* w, const float* scales, WarpSums& sums) {
    if (FL_EXACT) {
#pragma unroll
        for (int step = 0; step < DEPTH / 16; ++step)
            sums.add<Type, ALONG, ROW_BYTES, ALONG, ROW_BYTES>(x, warp_row(), w, warp_col(), step);
        return;
    }
#pragma unroll
    for (int grain = 0; grain < DEPTH / GRAIN; ++grain) {
        WarpSums part;
        part.clear();
#pragma unroll
        for (int step = 0; step < GRAIN / 16; ++step)
            part.add<Type, ALONG, ROW_BYTES, ALONG, ROW_BYTES>(x, warp_row(), w, warp_col(),
                                                               grain * (GRAIN / 16) + step);
        const float* scale = scales + grain * FL_TILE_N + warp_col() + thread_x() % 4 * 2;
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j) {
            const auto pair = load(reinterpret_cast<const Vec<float, 2>*>(scale + 8 * j));
#pragma unroll
            for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums.at[i][j][e] += pair.at[e % 2] * part.at[i][j][e];
        }
    }
}

// Adds scaling · S · Bᵀ as more depth: both operands rounded to 16 bits, sixty-four of the rank at a time.
FL_DEVICE void add_branch(const Layout<Tile>& layout, const Type* s, const LoraType* b, i64 m, i64 n, float scaling,
                          WarpSums& sums) {
    constexpr int STEPS = (FL_RANK < DEPTH ? FL_RANK + 15 : DEPTH) / 16;
    WarpSums part;
    part.clear();
    for (int first = 0; first < FL_RANK; first += DEPTH) {
        const i64 row = static_cast<i64>(block_y()) * FL_TILE_M, col = static_cast<i64>(block_x()) * FL_TILE_N;
        fill_tile<Type, FL_TILE_M, ROW_BYTES, THREADS>(Dense<Type>{s, m, FL_RANK}, row, first, layout.activations(0));
        fill_tile<Type, FL_TILE_N, ROW_BYTES, THREADS>(Dense<LoraType>{b, n, FL_RANK}, col, first, layout.tile(0));
        block_barrier();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            part.add<Type, ALONG, ROW_BYTES, ALONG, ROW_BYTES>(layout.activations(0), warp_row(), layout.tile(0),
                                                               warp_col(), step);
        block_barrier();
    }
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.at[i][j][e] += scaling * part.at[i][j][e];
}

FL_KERNEL(THREADS, 1)
gemm_4bit(const Type* __restrict__ x, const u8* __restrict__ codes, const void* __restrict__ absmax,
          const float* __restrict__ nested, const float* __restrict__ offset, const BiasType* __restrict__ bias,
          const Type* __restrict__ s, const LoraType* __restrict__ b, Type* __restrict__ y, float* __restrict__ partial,
          u32* __restrict__ counters, i64 m, i64 n, i64 k, float scaling) {
    const Layout<Tile> layout;
    Tile weight(codes, absmax, nested, offset, n, k);
    const Share share = share_of(k / DEPTH);
    const i64 first_row = static_cast<i64>(block_x()) * FL_TILE_N;
    const auto column = [&](int step) { return static_cast<i64>(share.first + step) * DEPTH; };
    WarpSums sums;
    sums.clear();
    walk(
        layout, weight, share.last - share.first,
        [&](int step) {
            copy_activations(x, m, k, column(step), layout.activations(step));
            weight.copy_codes(first_row, column(step), layout.codes(step));
        },
        [&](int step) { weight.fetch_scales(first_row, column(step)); },
        [&](int step) { multiply_step(layout.activations(step), layout.tile(step), layout.scales(step), sums); });
    if (FL_RANK > 0 && block_z() == 0) add_branch(layout, s, b, m, n, scaling, sums);
    finish(layout, sums, m, n, partial, counters, [&](i64 row, i64 col, float (&values)[8]) {
        if (bias) {
            float b8[8];
            load_run(bias, n, col, b8);
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] += b8[i];
        }
        store_run(y + row * n, n, col, values);
    });
}
