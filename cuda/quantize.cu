// Floats to codes: absmax of a block, the code of x / absmax, two codes a byte; and double quantization of the absmax.
#include "common/decode.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

using Type = FL_TYPE;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr u32 INFINITY_BITS = 0x7f800000u;

// An absmax below this counts as this in the division, so that its reciprocal is finite.
constexpr float SMALLEST_ABSMAX = 1e-38f;

FL_DEVICE u32 magnitude_bits(float x) { return as_bits(x) & 0x7fffffffu; } // ordered as the magnitudes are; NaN last

FL_DEVICE u32 magnitude_bits(const float (&values)[8]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 bits = magnitude_bits(values[i]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

FL_DEVICE float inverse(float absmax) { return rcp_rn(absmax > SMALLEST_ABSMAX ? absmax : SMALLEST_ABSMAX); }

// Number of the 2^n - 1 ascending thresholds, in shared memory, that are below the value.
FL_DEVICE u32 rank_of(const float* thresholds, int count, float value) {
    u32 rank = 0;
    for (int half = count / 2; half > 0; half /= 2)
        if (value > load(thresholds + rank + half - 1)) rank += half;
    return rank;
}

#ifdef FL_CODEC
using Codec = FL_CODEC;

// A block of values is shared by up to a warp, eight values a lane and step.
constexpr int LANES = FL_BLOCK_SIZE / 8 < 32 ? FL_BLOCK_SIZE / 8 : 32;
constexpr int STEPS = FL_BLOCK_SIZE / 8 / LANES;
constexpr int BLOCKS = THREADS / LANES; // of values, in a block of threads

template <class> struct Encoder;
template <> struct Encoder<nf4> {
    static constexpr int COUNT = 16;
    static FL_DEVICE_CONSTEXPR u32 threshold(int i) { return NF4_THRESHOLDS[i]; }
    static FL_DEVICE u32 code(const float* thresholds, float scaled) { return rank_of(thresholds, COUNT, scaled); }
};
template <> struct Encoder<fp4> {
    static constexpr int COUNT = 8;
    static FL_DEVICE_CONSTEXPR u32 threshold(int i) { return FP4_THRESHOLDS[i]; }
    static FL_DEVICE u32 code(const float* thresholds, float scaled) {
        const u32 rank = rank_of(thresholds, COUNT, as_float(magnitude_bits(scaled)));
        return (FP4_CODE_OF_RANK >> (4 * rank) & 7u) | (scaled < 0.0f ? 8u : 0u);
    }
};

// Eight codes, packed: the first of a byte in its high nibble.
FL_DEVICE u32 encode8(const float* thresholds, const float (&values)[8], float factor, i64 count) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 code = i < count ? Encoder<Codec>::code(thresholds, values[i] * factor) : Codec::ZERO_CODE;
        word |= code << (8 * (i / 2) + (i % 2 ? 0 : 4));
    }
    return word;
}

FL_DEVICE void load_some(const Type* x, i64 index, i64 numel, float (&values)[8]) {
    if (index + 8 <= numel)
        load8(x + index, values);
    else
        load8_tail(x + index, numel - index, values);
}

FL_KERNEL(THREADS)
quantize_4bit(const Type* __restrict__ x, u8* __restrict__ codes, float* __restrict__ absmax,
              u32* __restrict__ nonfinite, i64 numel) {
    FL_SHARED(float, thresholds, Encoder<Codec>::COUNT);
#pragma unroll
    for (int i = 0; i < Encoder<Codec>::COUNT; ++i)
        if (thread_x() == i) store(thresholds + i, as_float(Encoder<Codec>::threshold(i)));
    block_barrier();
    const i64 block = static_cast<i64>(block_x()) * BLOCKS + thread_x() / LANES;
    const i64 first = block * FL_BLOCK_SIZE + thread_x() % LANES * 8;
    float values[8];
    u32 largest = 0;
    for (int step = 0; step < STEPS; ++step) {
        load_some(x, first + step * LANES * 8, numel, values);
        const u32 bits = magnitude_bits(values);
        largest = bits > largest ? bits : largest;
    }
    largest = group_max<LANES>(largest);
    const bool spoilt = ballot(largest >= INFINITY_BITS) != 0;
    if (spoilt && thread_x() % 32 == 0) store(nonfinite, 1u);
    if (block * FL_BLOCK_SIZE >= numel) return;
    if (thread_x() % LANES == 0) store(absmax + block, as_float(largest));
    const float factor = inverse(as_float(largest));
    for (int step = 0; step < STEPS; ++step) {
        const i64 index = first + step * LANES * 8, count = numel - index;
        if (count <= 0) break;
        if (STEPS > 1) load_some(x, index, numel, values); // again, from the cache: large blocks do not fit registers
        const u32 word = encode8(thresholds, values, factor, count);
        if (count >= 8) {
            store(reinterpret_cast<u32*>(codes + index / 2), word);
        } else {
            for (int i = 0; i < (count + 1) / 2; ++i) store(codes + index / 2 + i, static_cast<u8>(word >> (8 * i)));
        }
    }
}
#else

constexpr int MEAN_THREADS = 1024;

// offset = mean(absmax), summed in float64 and rounded once. One block: the values are few, and the order is fixed.
FL_KERNEL(MEAN_THREADS) absmax_mean(const float* __restrict__ absmax, float* __restrict__ offset, i64 blocks) {
    FL_SHARED(double, sums, MEAN_THREADS);
    double sum = 0.0;
#pragma unroll 8
    for (i64 i = thread_x(); i < blocks; i += MEAN_THREADS) sum += load(absmax + i);
    store(sums + thread_x(), sum);
    for (int half = MEAN_THREADS / 2; half > 0; half /= 2) {
        block_barrier();
        if (thread_x() < half) store(sums + thread_x(), load(sums + thread_x()) + load(sums + thread_x() + half));
    }
    if (thread_x() == 0)
        store(offset, blocks > 0 ? static_cast<float>(load(sums) / static_cast<double>(blocks)) : 0.0f);
}

constexpr int NESTED_BLOCK_SIZE = 256; // 32 lanes of eight

// codes = dynamic8((absmax - offset) / nested) with nested = max|absmax - offset| over 256 blocks.
FL_KERNEL(THREADS)
quantize_absmax(const float* __restrict__ absmax, const float* __restrict__ offset, u8* __restrict__ codes,
                float* __restrict__ nested, i64 blocks) {
    FL_SHARED(float, thresholds, 256);
    store(thresholds + thread_x(), as_float(DYNAMIC8_THRESHOLDS[thread_x()]));
    block_barrier();
    const i64 group = static_cast<i64>(block_x()) * WARPS + thread_x() / 32;
    const i64 first = group * NESTED_BLOCK_SIZE + thread_x() % 32 * 8, count = blocks - first;
    const float mean = load(offset);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? load(absmax + first + i) - mean : 0.0f;
    const u32 largest = group_max<32>(magnitude_bits(values));
    if (group * NESTED_BLOCK_SIZE >= blocks) return;
    if (thread_x() % 32 == 0) store(nested + group, as_float(largest));
    const float factor = inverse(as_float(largest));
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < count) store(codes + first + i, static_cast<u8>(rank_of(thresholds, 256, values[i] * factor)));
}

// Two factors whose product is 127 / SCB, to be applied one after the other. The first is 1 unless the row is so small
// that 127 / SCB overflows; then it is 2^64, which lifts the row out of the subnormal numbers without a rounding.
FL_DEVICE void scale_to_127(float scb, float& lift, float& factor) {
    lift = 1.0f;
    factor = scb == 0.0f ? 0.0f : rcp_rn(scb) * 127.0f;
    if (magnitude_bits(factor) < INFINITY_BITS) return;
    lift = 18446744073709551616.0f;
    factor = rcp_rn(scb * lift) * 127.0f;
}

// A row a block: SCB = max|x|, code = round(x · 127 / SCB), ties to even.
FL_KERNEL(THREADS)
quantize_int8(const Type* __restrict__ x, i8* __restrict__ codes, float* __restrict__ scb, u32* __restrict__ nonfinite,
              i64 rows, i64 cols) {
    FL_SHARED(u32, maxima, WARPS);
    const i64 row = block_x();
    if (row >= rows) return;
    const Type* line = x + row * cols;
    u32 largest = 0;
    for (i64 i = thread_x(); i < cols; i += THREADS) {
        const u32 bits = magnitude_bits(to_float(load(line + i)));
        largest = bits > largest ? bits : largest;
    }
    largest = group_max<32>(largest);
    if (thread_x() % 32 == 0) store(maxima + thread_x() / 32, largest);
    block_barrier();
    largest = group_max<WARPS>(load(maxima + thread_x() % WARPS));
    const float absmax = as_float(largest);
    if (thread_x() == 0) {
        store(scb + row, absmax);
        if (largest >= INFINITY_BITS) store(nonfinite, 1u);
    }
    float lift, factor;
    scale_to_127(absmax, lift, factor);
    for (i64 i = thread_x(); i < cols; i += THREADS)
        store(codes + row * cols + i, static_cast<i8>(cvt_rni(to_float(load(line + i)) * lift * factor)));
}
#endif
