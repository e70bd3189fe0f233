// The low-rank branch added to a product that another kernel made: y += scaling · S · Bᵀ and dX += mask ⊙ (dS · A).
#include "common/lora_tile.cuh"

constexpr int STRIDE = TILE + 8; // words of a staged row: a half-warp's pairs fall into all banks

// Adds left [lines, r] · right to the block's 64×64 tile of out [lines, width], with factor(row, col, factors) for
// eight columns at a time. `O` says whether the rank runs along the lines of `right`, [width, r], or across them, [r,
// width].
template <Order O, class Left, class Right, class Factor>
FL_DEVICE void add_to(Type* out, i64 lines, i64 width, const Left& left, const Right& right, const Factor& factor) {
    FL_SHARED(u8, tile_a, TILE_BYTES);
    FL_SHARED(u8, tile_b, TILE_BYTES);
    FL_SHARED(float, staged, TILE* STRIDE);
    const i64 first_row = static_cast<i64>(block_y()) * TILE, first_col = static_cast<i64>(block_x()) * TILE;
    Sums<1, TILE / 8> sums;
    sums.clear();
    for (int rank = 0; rank < FL_RANK; rank += TILE) {
        fill_tile<Type, TILE, ROW_BYTES, THREADS>(left, first_row, rank, tile_a);
        fill_tile<Type, TILE, ROW_BYTES, THREADS>(right, O == ALONG ? first_col : rank, O == ALONG ? rank : first_col,
                                                  tile_b);
        block_barrier();
#pragma unroll
        for (int step = 0; step < WIDTH / 16; ++step)
            sums.template add<Type, ALONG, ROW_BYTES, O, ROW_BYTES>(tile_a, thread_x() / 32 * 16, tile_b, 0, step);
        block_barrier();
    }
    Sums<1, TILE / 8>::pairs([&](int i, int j, int half, int row, int col) {
        const Vec<float, 2> pair{{sums.at[i][j][2 * half], sums.at[i][j][2 * half + 1]}};
        store(reinterpret_cast<Vec<float, 2>*>(staged + (thread_x() / 32 * 16 + row) * STRIDE + col), pair);
    });
    block_barrier();
    for (int i = thread_x(); i < TILE * 8; i += THREADS) {
        const i64 row = first_row + i / 8, col = first_col + i % 8 * 8;
        if (row >= lines || col >= width) continue;
        float values[8], factors[8], branch[8];
        load_run(out + row * width, width, col, values);
        load8(staged + i / 8 * STRIDE + i % 8 * 8, branch);
        factor(row, col, factors);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] += factors[j] * branch[j];
        store_run(out + row * width, width, col, values);
    }
}

FL_KERNEL(THREADS)
lora_add_output(const Type* __restrict__ s, const LoraType* __restrict__ b, Type* __restrict__ y, i64 m, i64 n,
                float scaling) {
    add_to<ALONG>(y, m, n, Dense<Type>{s, m, FL_RANK}, Dense<LoraType>{b, n, FL_RANK},
                  [&](i64, i64, float (&factors)[8]) {
#pragma unroll
                      for (int i = 0; i < 8; ++i) factors[i] = scaling;
                  });
}

FL_KERNEL(THREADS)
lora_add_input_gradient(const float* __restrict__ ds, const LoraType* __restrict__ a, const u64* __restrict__ seed,
                        Type* __restrict__ dx, i64 m, i64 k, u32 threshold, float keep) {
    const Dropout dropout = make_dropout<FL_DROPOUT>(seed, threshold, keep);
    add_to<ACROSS>(dx, m, k, Dense<float>{ds, m, FL_RANK}, Dense<LoraType>{a, FL_RANK, k},
                   [&](i64 row, i64 col, float (&factors)[8]) {
#pragma unroll
                       for (int group = 0; group < 2; ++group) {
                           u32 words[4];
                           if (FL_DROPOUT) dropout.words(row, col / 4 + group, words);
#pragma unroll
                           for (int i = 0; i < 4; ++i)
                               factors[4 * group + i] = !FL_DROPOUT ? 1.0f : words[i] < threshold ? 0.0f : keep;
                       }
                   });
}
