// The products of the low-rank branch with float32 multiply-adds: any type and shape.
#include "common/fma_product.cuh"

using Type = FL_TYPE;
using LoraType = FL_LORA_TYPE;

// S [M, r] = drop(x) · Aᵀ
FL_KERNEL(FMA_THREADS)
fma_lora_input(const Type* __restrict__ x, const LoraType* __restrict__ a, const u64* __restrict__ seed,
               Type* __restrict__ s, float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 k,
               u32 threshold, float keep) {
    const Dropped<Type, FL_DROPOUT> left{{x, m, k}, make_dropout<FL_DROPOUT>(seed, threshold, keep)};
    FmaTile tile;
    tile.accumulate<ALONG_DEPTH, ALONG_DEPTH>(left, Dense<LoraType>{a, FL_RANK, k}, share_of(fma_steps(k)));
    tile.finish(m, FL_RANK, partial, counters,
                [&](i64 row, i64 col, float sum) { store(s + row * FL_RANK + col, from_float<Type>(sum)); });
}

// dS [M, r] = scaling · dY · B
FL_KERNEL(FMA_THREADS)
fma_lora_ds(const Type* __restrict__ dy, const LoraType* __restrict__ b, float* __restrict__ ds,
            float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 n, float scaling) {
    FmaTile tile;
    const Dense<LoraType> right{b, n, FL_RANK};
    tile.accumulate<ALONG_DEPTH, ACROSS_DEPTH>(Dense<Type>{dy, m, n}, right, share_of(fma_steps(n)));
    tile.finish(m, FL_RANK, partial, counters,
                [&](i64 row, i64 col, float sum) { store(ds + row * FL_RANK + col, scaling * sum); });
}

// dB [N, r] = scaling · dYᵀ · S
FL_KERNEL(FMA_THREADS)
fma_lora_db(const Type* __restrict__ dy, const Type* __restrict__ s, LoraType* __restrict__ db,
            float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 n, float scaling) {
    FmaTile tile;
    const Dense<Type> right{s, m, FL_RANK};
    tile.accumulate<ACROSS_DEPTH, ACROSS_DEPTH>(Dense<Type>{dy, m, n}, right, share_of(fma_steps(m)));
    tile.finish(n, FL_RANK, partial, counters, [&](i64 row, i64 col, float sum) {
        store(db + row * FL_RANK + col, from_float<LoraType>(scaling * sum));
    });
}

// dA [r, K] = dSᵀ · drop(x)
FL_KERNEL(FMA_THREADS)
fma_lora_da(const Type* __restrict__ x, const float* __restrict__ ds, const u64* __restrict__ seed,
            LoraType* __restrict__ da, float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 k,
            u32 threshold, float keep) {
    const Dropped<Type, FL_DROPOUT> right{{x, m, k}, make_dropout<FL_DROPOUT>(seed, threshold, keep)};
    FmaTile tile;
    tile.accumulate<ACROSS_DEPTH, ACROSS_DEPTH>(Dense<float>{ds, m, FL_RANK}, right, share_of(fma_steps(m)));
    tile.finish(FL_RANK, k, partial, counters,
                [&](i64 row, i64 col, float sum) { store(da + row * k + col, from_float<LoraType>(sum)); });
}
