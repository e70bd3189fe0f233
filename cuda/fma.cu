// The quantized linear with float32 multiply-adds: any type, codec and shape. What the tensor-core kernels are held to.
#include "common/fma_product.cuh"

using Type = FL_TYPE;
using LoraType = FL_LORA_TYPE;
using BiasType = FL_BIAS_TYPE;
using QuantWeight = Weight<FL_CODEC, FL_BLOCK_SIZE, FL_NESTED>;

// y [M, N] = x · Wᵀ + bias + scaling · S · Bᵀ
FL_KERNEL(FMA_THREADS, 2)
fma_forward(const Type* __restrict__ x, const void* __restrict__ codes, const void* __restrict__ absmax,
            const float* __restrict__ nested, const float* __restrict__ offset, const BiasType* __restrict__ bias,
            const Type* __restrict__ s, const LoraType* __restrict__ b, Type* __restrict__ y,
            float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 n, i64 k, float scaling) {
    const QuantWeight weight(codes, absmax, nested, offset, n, k);
    FmaTile tile;
    tile.accumulate<ALONG_DEPTH, ALONG_DEPTH>(Dense<Type>{x, m, k}, weight, share_of(fma_steps(k)));
    if (FL_RANK > 0 && block_z() == 0) {
        FmaTile branch;
        const Dense<Type> left{s, m, FL_RANK};
        const Dense<LoraType> right{b, n, FL_RANK};
        branch.accumulate<ALONG_DEPTH, ALONG_DEPTH>(left, right, whole_depth(FL_RANK));
#pragma unroll
        for (int i = 0; i < 16; ++i) tile.sums[i / 4][i % 4] += scaling * branch.sums[i / 4][i % 4];
    }
    tile.finish(m, n, partial, counters, [&](i64 row, i64 col, float sum) {
        store(y + row * n + col, from_float<Type>(bias ? sum + to_float(load(bias + col)) : sum));
    });
}

// dX [M, K] = dY · W + mask ⊙ (dS · A); dS holds the scaling already.
FL_KERNEL(FMA_THREADS, 2)
fma_backward(const Type* __restrict__ dy, const void* __restrict__ codes, const void* __restrict__ absmax,
             const float* __restrict__ nested, const float* __restrict__ offset, const float* __restrict__ ds,
             const LoraType* __restrict__ a, const u64* __restrict__ seed, Type* __restrict__ dx,
             float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 n, i64 k, u32 threshold, float keep) {
    const QuantWeight weight(codes, absmax, nested, offset, n, k);
    FmaTile tile;
    tile.accumulate<ALONG_DEPTH, ACROSS_DEPTH>(Dense<Type>{dy, m, n}, weight, share_of(fma_steps(n)));
    if (FL_RANK > 0 && block_z() == 0) {
        const Dropout dropout = make_dropout<FL_DROPOUT>(seed, threshold, keep);
        FmaTile branch;
        const Dense<float> left{ds, m, FL_RANK};
        const Dense<LoraType> right{a, FL_RANK, k};
        branch.accumulate<ALONG_DEPTH, ACROSS_DEPTH>(left, right, whole_depth(FL_RANK));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 words[4];
            if (FL_DROPOUT) dropout.words(tile.row(i), tile.col(0) / 4, words);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float factor = !FL_DROPOUT ? 1.0f : words[j] < threshold ? 0.0f : keep;
                tile.sums[i][j] += factor * branch.sums[i][j];
            }
        }
    }
    tile.finish(m, k, partial, counters,
                [&](i64 row, i64 col, float sum) { store(dx + row * k + col, from_float<Type>(sum)); });
}
