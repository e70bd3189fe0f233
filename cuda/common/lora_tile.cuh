// The pieces of lora.cu: 64×64 tiles of x or dY in a ring of shared memory, and thin tiles of the branch's operands.
//
// With T a matrix [M, C] (x or dY), all products here are of T with something r columns wide:
//   along the lines of T    Q [M, r] = T · V         (S, dS)
//   across them             G [C, r] = Tᵀ · P        (dA transposed, dB)
// Both read one tile of T: the first product as it is, the second transposed by ldmatrix.
#pragma once
#include "matrix.cuh"
#include "split.cuh"
#include "tile.cuh"

using Type = FL_TYPE;
using LoraType = FL_LORA_TYPE;

constexpr int THREADS = 128;
constexpr int TILE = 64;
constexpr int ROW_BYTES = 2 * TILE;
constexpr int TILE_BYTES = TILE * ROW_BYTES;

// The rank is padded to whole products of sixteen; a block takes up to 64 of it.
constexpr int WIDTH = FL_RANK < TILE ? (FL_RANK + 15) / 16 * 16 : TILE;
constexpr int THIN_BYTES = WIDTH * ROW_BYTES; // of an operand's tile, [rank][64]
constexpr int SLOTS = WIDTH <= 32 ? 3 : 2;    // of the ring

// A warp's sums: 16 lines (or columns) of T by WIDTH.
using ThinSums = Sums<1, WIDTH / 8>;

// x or dY, [lines, width], width a multiple of 8, with its mask; what is kept is not yet divided by 1 - p.
template <bool Active> struct Tall {
    const Type* data;
    i64 lines, width;
    Dropout dropout;

    // Asks for the tile at (line, col): four chunks a thread, zeros outside.
    FL_DEVICE void copy(i64 line, i64 col, u8* tile) const {
#pragma unroll
        for (int i = thread_x(); i < TILE * 8; i += THREADS) {
            const i64 l = line + i / 8, c = col + i % 8 * 8;
            const bool inside = l < lines && c < width;
            cp_async_16(tile + chunk_offset<ROW_BYTES>(i / 8, i % 8), data + (inside ? l * width + c : 0),
                        inside ? 16 : 0);
        }
    }

    // Drops elements of the chunks that this thread copied; they are there for it, and for others after a barrier.
    FL_DEVICE void mask(i64 line, i64 col, u8* tile) const {
        if (!Active) return;
        for (int i = thread_x(); i < TILE * 8; i += THREADS) {
            auto* chunk = reinterpret_cast<Words4*>(tile + chunk_offset<ROW_BYTES>(i / 8, i % 8));
            Words4 values = load(chunk);
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                u32 words[4];
                dropout.words(line + i / 8, (col + i % 8 * 8) / 4 + group, words);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (words[j] < dropout.threshold) values.at[2 * group + j / 2] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
            }
            store(chunk, values);
        }
    }
};

// Walks `count` tiles of T through the ring. place(step) gives (line, col); before(step) runs ahead of the barrier that
// precedes use(step, tile).
struct Corner {
    i64 line, col;
};
template <class T, class Place, class Before, class Use>
FL_DEVICE void walk(const T& tall, u8* ring, int count, const Place& place, const Before& before, const Use& use) {
    const auto ask = [&](int step) {
        if (step < count) tall.copy(place(step).line, place(step).col, ring + step % SLOTS * TILE_BYTES);
        cp_async_commit();
    };
    for (int step = 0; step < SLOTS - 1; ++step) ask(step);
    for (int step = 0; step < count; ++step) {
        u8* tile = ring + step % SLOTS * TILE_BYTES;
        cp_async_wait<SLOTS - 2>();
        tall.mask(place(step).line, place(step).col, tile);
        before(step);
        block_barrier();
        ask(step + SLOTS - 1);
        use(step, tile);
    }
    cp_async_wait<0>();
    block_barrier();
}

// Rounds an operand [rank, length] into a thin tile: ranks from `rank`, 64 of the length from `pos`.
template <class T> FL_DEVICE void fill_thin(const Dense<T>& operand, i64 rank, i64 pos, u8* tile) {
    fill_tile<Type, WIDTH, ROW_BYTES, THREADS>(operand, rank, pos, tile);
}

// The same of an operand [length, rank], transposed on the way.
template <class T> FL_DEVICE void fill_thin_transposed(const Dense<T>& operand, i64 rank, i64 pos, u8* tile) {
    for (int i = thread_x(); i < TILE * (WIDTH / 8); i += THREADS) {
        const int line = i / (WIDTH / 8), first = i % (WIDTH / 8) * 8;
        float values[8];
        operand.run(pos + line, rank + first, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            u8* chunk = tile + chunk_offset<ROW_BYTES>(first + j, line / 8);
            store(reinterpret_cast<Type*>(chunk) + line % 8, from_float<Type>(values[j]));
        }
    }
}

// Adds tile · thin (Order ALONG) or tileᵀ · thin (ACROSS) to the warp's sums.
template <Order O> FL_DEVICE void add_product(const u8* tile, const u8* thin, ThinSums& sums) {
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step)
        sums.add<Type, O, ROW_BYTES, ALONG, ROW_BYTES>(tile, thread_x() / 32 * 16, thin, 0, step);
}

// Calls write(i, j, sum) for the warp's sums: i counts lines from `first`, j ranks from `rank`; only those that exist.
template <class Write>
FL_DEVICE void each_sum(const ThinSums& sums, i64 first, i64 count, i64 rank, const Write& write) {
    ThinSums::pairs([&](int i, int j, int half, int row, int col) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const i64 line = first + thread_x() / 32 * 16 + row, r = rank + col + e;
            if (line < count && r < FL_RANK) write(line, r, sums.at[i][j][2 * half + e]);
        }
    });
}
