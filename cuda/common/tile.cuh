// Tiles of 16-bit elements in shared memory, and the tensor core's operands out of them.
//
// A row is RowBytes long, a multiple of 128, in chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so that eight
// rows of one chunk, which ldmatrix reads together, are in eight different places of the banks.
#pragma once
#include "mma.cuh"
#include "vec.cuh"

template <int RowBytes> FL_DEVICE int chunk_offset(int row, int chunk) {
    static_assert(RowBytes % 128 == 0, "rows hold whole groups of eight chunks");
    return row * RowBytes + (chunk ^ row % 8) * 16;
}

// Whether the depth of the product runs along the rows of an operand's tile, or across them.
enum Order { ALONG, ACROSS };

// The first operand's registers: rows `row` … row + 15 and depth 16·step … 16·step + 15 of the product.
template <Order O, int RowBytes> FL_DEVICE void load_a(const u8* tile, int row, int step, u32 (&a)[4]) {
    const int lane = thread_x() % 32, matrix = lane / 8, line = lane % 8;
    if (O == ALONG) {
        ldmatrix_x4(a, tile + chunk_offset<RowBytes>(row + matrix % 2 * 8 + line, 2 * step + matrix / 2));
    } else {
        ldmatrix_x4_trans(a, tile + chunk_offset<RowBytes>(16 * step + matrix / 2 * 8 + line, row / 8 + matrix % 2));
    }
}

// The second operand's registers of two neighbouring products: columns `col` … col + 7 in b[0], b[1], the next eight in
// b[2], b[3].
template <Order O, int RowBytes> FL_DEVICE void load_b(const u8* tile, int col, int step, u32 (&b)[4]) {
    const int lane = thread_x() % 32, matrix = lane / 8, line = lane % 8;
    if (O == ALONG) {
        ldmatrix_x4(b, tile + chunk_offset<RowBytes>(col + matrix / 2 * 8 + line, 2 * step + matrix % 2));
    } else {
        ldmatrix_x4_trans(b, tile + chunk_offset<RowBytes>(16 * step + matrix % 2 * 8 + line, col / 8 + matrix / 2));
    }
}

// The sums of a warp: MT × NT products of 16×8.
template <int MT, int NT> struct Sums {
    float at[MT][NT][4];

    FL_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) at[i][j][e] = 0.0f;
    }

    // Adds sixteen of the depth: rows from `row` of tile a, columns from `col` of tile b.
    template <class T, Order OA, int BytesA, Order OB, int BytesB>
    FL_DEVICE void add(const u8* a, int row, const u8* b, int col, int step) {
        u32 left[MT][4];
#pragma unroll
        for (int i = 0; i < MT; ++i) load_a<OA, BytesA>(a, row + 16 * i, step, left[i]);
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            u32 right[4];
            load_b<OB, BytesB>(b, col + 8 * j, step, right);
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                Mma<T>::add(at[i][j], left[i], right[0], right[1]);
                Mma<T>::add(at[i][j + 1], left[i], right[2], right[3]);
            }
        }
    }

    // Calls f(i, j, half, row, col): elements 2·half and 2·half + 1 of at[i][j] are at (row, col) and (row, col + 1).
    template <class F> FL_DEVICE static void pairs(const F& f) {
        const int lane = thread_x() % 32;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) f(i, j, half, 16 * i + 8 * half + lane / 4, 8 * j + lane % 4 * 2);
    }
};

// Rounds lines `first_line` … and positions `first_pos` … of a matrix (matrix.cuh) into a tile of Rows × 64 or more.
template <class T, int Rows, int RowBytes, int Threads, class Matrix>
FL_DEVICE void fill_tile(const Matrix& matrix, i64 first_line, i64 first_pos, u8* tile) {
    constexpr int CHUNKS = RowBytes / 16;
    for (int i = thread_x(); i < Rows * CHUNKS; i += Threads) {
        float values[8];
        matrix.run(first_line + i / CHUNKS, first_pos + i % CHUNKS * 8, values);
        store8(reinterpret_cast<T*>(tile + chunk_offset<RowBytes>(i / CHUNKS, i % CHUNKS)), values);
    }
}
