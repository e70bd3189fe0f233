// The dropout mask: Philox4x32-10, counter (col / 4, row), key seed; element (row, col) takes word col % 4 and is
// dropped if that is below the threshold p · 2^32. The same function as in rust/core, so no mask is ever stored.
#pragma once
#include "ptx.cuh"

struct Dropout {
    u32 key0, key1;
    u32 threshold;
    float keep; // 1 / (1 - p), the factor of what is kept

    // The words of columns 4·group … 4·group + 3 of a row.
    FL_DEVICE void words(i64 row, i64 group, u32 (&c)[4]) const {
        u32 k0 = key0, k1 = key1;
        c[0] = static_cast<u32>(group), c[1] = static_cast<u32>(static_cast<u64>(group) >> 32);
        c[2] = static_cast<u32>(row), c[3] = static_cast<u32>(static_cast<u64>(row) >> 32);
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const u32 high0 = mul_hi(0xd2511f53u, c[0]), low0 = 0xd2511f53u * c[0];
            const u32 high1 = mul_hi(0xcd9e8d57u, c[2]), low1 = 0xcd9e8d57u * c[2];
            c[0] = high1 ^ c[1] ^ k0, c[1] = low1;
            c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
            k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
        }
    }

    // Whether element (row, col) is kept.
    FL_DEVICE bool keeps(i64 row, i64 col) const {
        u32 c[4];
        words(row, col / 4, c);
        const int i = static_cast<int>(col % 4);
        const u32 word = i < 2 ? (i == 0 ? c[0] : c[1]) : (i == 2 ? c[2] : c[3]);
        return word >= threshold;
    }
};

// Reads the key from device memory; nothing is read if `Active` is false.
template <bool Active> FL_DEVICE Dropout make_dropout(const u64* seed, u32 threshold, float keep) {
    const u64 key = Active ? load(seed) : 0;
    return Dropout{static_cast<u32>(key), static_cast<u32>(key >> 32), threshold, keep};
}
