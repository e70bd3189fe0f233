// Codes and scales to floats: table[code] · absmax, rounded once.
#include "common/decode.cuh"
#include "common/scales.cuh"
#include "common/vec.cuh"

using Type = FL_TYPE;
constexpr int THREADS = 256;
constexpr int CHUNKS = 4; // eight values each; a warp's stores of one chunk are contiguous, four loads are in flight
constexpr int VALUES = CHUNKS * THREADS * 8;

#ifdef FL_CODEC
using Codec = FL_CODEC;

// The sixteen values in shared memory, each in a bank of its own. Where float32 values are wanted, a load from there is
// cheaper than the permutes of four byte planes.
FL_DEVICE const float* value_table() {
    FL_SHARED(float, table, 16);
    if (thread_x() < 16) {
        float values[8];
        decode8<Codec>(static_cast<u32>(thread_x()), values); // one byte: its low nibble is the second code
        store(table + thread_x(), values[1]);
    }
    block_barrier();
    return table;
}

// Eight packed codes times their scale.
FL_DEVICE void decode_scaled(const float* table, u32 word, float scale, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = load(table + (word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u)) * scale;
}

// The word of values index … index + 7, of which `count` exist; index is a multiple of 8.
FL_DEVICE u32 load_word(const u8* codes, i64 index, i64 count) {
    if (count >= 8) return load(reinterpret_cast<const u32*>(codes + index / 2));
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (2 * i < count) word |= static_cast<u32>(load(codes + index / 2 + i)) << (8 * i);
    return word;
}

// out [numel]
FL_KERNEL(THREADS)
dequantize_4bit(const u8* __restrict__ codes, const void* __restrict__ absmax, const float* __restrict__ nested,
                const float* __restrict__ offset, Type* __restrict__ out, i64 numel) {
    const float* table = value_table();
    // What a block of threads decodes starts with a block of the codec; from there on 32 bits count.
    const i64 first = static_cast<i64>(block_x()) * VALUES, count = numel - first;
    const auto scales = Scales<FL_NESTED>(absmax, nested, offset).from(first / FL_BLOCK_SIZE);
    const u8* own_codes = codes + first / 2;
    Type* own_out = out + first;
    const u32 index = static_cast<u32>(thread_x()) * 8;
    if (count >= VALUES) {
        u32 words[CHUNKS];
        float scale[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i)
            words[i] = load(reinterpret_cast<const u32*>(own_codes + index / 2) + i * THREADS);
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) scale[i] = scales.at((index + i * THREADS * 8) / FL_BLOCK_SIZE);
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            float values[8];
            decode_scaled(table, words[i], scale[i], values);
            store8(own_out + index + i * THREADS * 8, values);
        }
        return;
    }
#pragma unroll 1
    for (u32 i = index; i < count; i += THREADS * 8) {
        float values[8];
        decode_scaled(table, load_word(own_codes, i, count - i), scales.at(i / FL_BLOCK_SIZE), values);
        store8_tail(own_out + i, count - i, values);
    }
}

constexpr int TILE = 64;
constexpr int STRIDE = TILE + 4 / static_cast<int>(sizeof(Type)); // an odd number of words: columns fall into all banks

// Sixteen values of row `row` from column `col`, wherever they lie in bytes and blocks.
FL_DEVICE void decode_run(const float* table, const u8* codes, const Scales<FL_NESTED>& scales, i64 row, i64 col, i64 k,
                          float (&out)[16]) {
    const i64 index = row * k + col;
    if (index % 8 == 0 && col + 16 <= k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float values[8];
            const i64 at = index + 8 * half;
            decode_scaled(table, load_word(codes, at, 8), scales.at(at / FL_BLOCK_SIZE), values);
#pragma unroll
            for (int i = 0; i < 8; ++i) out[8 * half + i] = values[i];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i)
        out[i] = col + i < k ? decode_at<Codec>(codes, index + i) * scales.at((index + i) / FL_BLOCK_SIZE) : 0.0f;
}

// out [K, N] of a weight [N, K]
FL_KERNEL(THREADS)
dequantize_4bit_transposed(const u8* __restrict__ codes, const void* __restrict__ absmax,
                           const float* __restrict__ nested, const float* __restrict__ offset, Type* __restrict__ out,
                           i64 n, i64 k) {
    FL_SHARED(Type, tile, TILE * STRIDE); // [k][n]
    const float* table = value_table();
    const Scales<FL_NESTED> scales(absmax, nested, offset);
    const i64 first_k = static_cast<i64>(block_x()) * TILE, first_n = static_cast<i64>(block_y()) * TILE;
    const int row = thread_x() / 4, part = thread_x() % 4 * 16;
    float values[16] = {};
    if (first_n + row < n) decode_run(table, codes, scales, first_n + row, first_k + part, k, values);
#pragma unroll
    for (int i = 0; i < 16; ++i) store(tile + (part + i) * STRIDE + row, from_float<Type>(values[i]));
    block_barrier();
    for (int chunk = thread_x(); chunk < TILE * TILE / 8; chunk += THREADS) {
        const i64 out_row = first_k + chunk / 8, col = first_n + chunk % 8 * 8;
        if (out_row >= k || col >= n) continue;
        const Type* from = tile + chunk / 8 * STRIDE + chunk % 8 * 8;
        float line[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) line[i] = to_float(load(from + i));
        if (n % 8 == 0)
            store8(out + out_row * n + col, line);
        else
            store8_tail(out + out_row * n + col, n - col, line);
    }
}
#else

// out [rows, cols]: code · SCB / 127
FL_KERNEL(THREADS)
dequantize_int8(const i8* __restrict__ codes, const float* __restrict__ scb, Type* __restrict__ out, i64 rows,
                i64 cols) {
    const i64 first = (static_cast<i64>(block_x()) * CHUNKS * THREADS + thread_x()) * 8;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const i64 index = first + i * THREADS * 8, count = rows * cols - index;
        if (count <= 0) return;
        i64 row = index / cols, col = index % cols;
        Vec<i8, 8> bytes{};
        if (count >= 8) {
            bytes = load(reinterpret_cast<const Vec<i8, 8>*>(codes + index));
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < count) bytes.at[j] = load(codes + index + j);
        }
        float scale = load(scb + row), values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j, ++col) {
            if (col == cols && j < count) scale = load(scb + ++row), col = 0;
            values[j] = int8_value(bytes.at[j], scale);
        }
        if (count >= 8)
            store8(out + index, values);
        else
            store8_tail(out + index, count, values);
    }
}
#endif
