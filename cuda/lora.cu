// The low-rank branch on tensor cores: S, dS and dB from one read of dY, dA, and the branch added to y or dX.
//
// Operands are rounded to 16 bits, sums are float32. Dropped elements are zero in the tile; 1 / (1 - p) and the scaling
// multiply the sum.
#include "common/lora_tile.cuh"

// S [M, r] = drop(x) · Aᵀ
FL_KERNEL(THREADS)
lora_input(const Type* __restrict__ x, const LoraType* __restrict__ a, const u64* __restrict__ seed,
           Type* __restrict__ s, float* __restrict__ partial, u32* __restrict__ counters, i64 m, i64 k, u32 threshold,
           float keep) {
    FL_SHARED(u8, ring, SLOTS * TILE_BYTES);
    FL_SHARED(u8, thin, 2 * THIN_BYTES);
    const Tall<FL_DROPOUT> tall{x, m, k, make_dropout<FL_DROPOUT>(seed, threshold, keep)};
    const Share share = share_of((k + TILE - 1) / TILE);
    const i64 line = static_cast<i64>(block_y()) * TILE, rank = static_cast<i64>(block_x()) * TILE;
    const auto place = [&](int step) { return Corner{line, static_cast<i64>(share.first + step) * TILE}; };
    const auto half = [&](int step) { return thin + step % 2 * THIN_BYTES; };
    ThinSums sums;
    sums.clear();
    walk(
        tall, ring, share.last - share.first, place,
        [&](int step) { fill_thin(Dense<LoraType>{a, FL_RANK, k}, rank, place(step).col, half(step)); },
        [&](int step, const u8* tile) { add_product<ALONG>(tile, half(step), sums); });
    const Parts parts{partial, m * FL_RANK};
    const float factor = FL_DROPOUT ? keep : 1.0f;
    if (grid_z() > 1) {
        each_sum(sums, line, m, rank, [&](i64 i, i64 j, float sum) { parts.put(i * FL_RANK + j, sum); });
        if (!adds_up(counters)) return;
    }
    each_sum(sums, line, m, rank, [&](i64 i, i64 j, float sum) {
        const i64 at = i * FL_RANK + j;
        store(s + at, from_float<Type>(factor * (grid_z() > 1 ? parts.sum(at) : sum)));
    });
}

// Partial results of blocks that share an output: `sharers` of them, this one is number `own`.
struct SharedSum {
    float* partial; // [sharers, size]
    i64 size;
    int own, sharers;
    u32* counter;

    FL_DEVICE void put(i64 at, float sum) const { store(partial + own * size + at, sum); }

    // In the last block to get here, calls write(i, j, sum) for lines first … last - 1 of the output and its ranks.
    template <class Write> FL_DEVICE void collect(i64 first, i64 last, i64 rank, const Write& write) const {
        if (!last_to_arrive(counter, static_cast<u32>(sharers))) return;
        const int width = static_cast<int>(min_of(FL_RANK - rank, TILE));
        for (i64 i = thread_x(); i < (last - first) * width; i += THREADS) {
            const i64 line = first + i / width, r = rank + i % width;
            float sum = 0.0f;
            for (int part = 0; part < sharers; ++part) sum += load(partial + part * size + line * FL_RANK + r);
            write(line, r, sum);
        }
    }
};

#ifdef FL_COLUMNS
constexpr int COLUMN_TILES = FL_COLUMNS / TILE;
constexpr int ROW_TILES = FL_ROWS / TILE;
static_assert(FL_COLUMNS * WIDTH <= 12288, "a block's sums across its rows stay in registers");
static_assert(SLOTS * TILE_BYTES + (COLUMN_TILES + 1) * THIN_BYTES < 48 * 1024,
              "and its tiles in static shared memory");

// A block's part of T: FL_ROWS × FL_COLUMNS, and the words where it meets the blocks of its rows and of its columns.
struct Part {
    i64 row, col, rank;
    int row_tiles, col_tiles; // that exist

    FL_DEVICE Part(i64 m, i64 c)
        : row(static_cast<i64>(block_y()) * FL_ROWS), col(static_cast<i64>(block_x()) * FL_COLUMNS),
          rank(static_cast<i64>(block_z()) * TILE),
          row_tiles(static_cast<int>(min_of(ROW_TILES, (m - row + TILE - 1) / TILE))),
          col_tiles(static_cast<int>(min_of(COLUMN_TILES, (c - col + TILE - 1) / TILE))) {}

    FL_DEVICE int steps() const { return row_tiles * col_tiles; }
    FL_DEVICE int row_tile(int step) const { return step / col_tiles; }
    FL_DEVICE int col_tile(int step) const { return step % col_tiles; }
    FL_DEVICE Corner place(int step) const { return {row + row_tile(step) * TILE, col + col_tile(step) * TILE}; }

    FL_DEVICE SharedSum rows(float* partial, u32* counters, i64 m) const {
        return {partial, m * FL_RANK, block_x(), grid_x(), counters + block_z() * (grid_x() + grid_y()) + block_y()};
    }
    FL_DEVICE SharedSum columns(float* partial, u32* counters, i64 c) const {
        u32* own = counters + block_z() * (grid_x() + grid_y()) + grid_y() + block_x();
        return {partial, c * FL_RANK, block_y(), grid_y(), own};
    }
};

// Sums across the rows, one set for each column tile. The loop is unrolled, so that `tile` picks registers.
struct ColumnSums {
    ThinSums at[COLUMN_TILES];

    FL_DEVICE ColumnSums() {
#pragma unroll
        for (int i = 0; i < COLUMN_TILES; ++i) at[i].clear();
    }
    FL_DEVICE void add(int column_tile, const u8* tile, const u8* thin) {
#pragma unroll
        for (int i = 0; i < COLUMN_TILES; ++i)
            if (i == column_tile) add_product<ACROSS>(tile, thin, at[i]);
    }
    FL_DEVICE void put(const Part& part, const SharedSum& shared, i64 count) const {
#pragma unroll
        for (int i = 0; i < COLUMN_TILES; ++i)
            each_sum(at[i], part.col + i * TILE, count, part.rank,
                     [&](i64 c, i64 r, float sum) { shared.put(c * FL_RANK + r, sum); });
    }
};

// dS [M, r] = scaling · dY · B and dB [N, r] = scaling · dYᵀ · S
FL_KERNEL(THREADS)
lora_output_gradients(const Type* __restrict__ dy, const LoraType* __restrict__ b, const Type* __restrict__ s,
                      float* __restrict__ ds, LoraType* __restrict__ db, float* __restrict__ ds_partial,
                      float* __restrict__ db_partial, u32* __restrict__ counters, i64 m, i64 n, float scaling) {
    FL_SHARED(u8, ring, SLOTS * TILE_BYTES);
    FL_SHARED(u8, thin, (COLUMN_TILES + 1) * THIN_BYTES); // Bᵀ of the block's columns, then Sᵀ of a row tile
    const Part part(m, n);
    const SharedSum row_sum = part.rows(ds_partial, counters, m), col_sum = part.columns(db_partial, counters, n);
    u8* thin_s = thin + COLUMN_TILES * THIN_BYTES;
    for (int i = 0; i < part.col_tiles; ++i)
        fill_thin_transposed(Dense<LoraType>{b, n, FL_RANK}, part.rank, part.col + i * TILE, thin + i * THIN_BYTES);
    ThinSums rows;
    ColumnSums columns;
    walk(
        Tall<false>{dy, m, n, {}}, ring, part.steps(), [&](int step) { return part.place(step); },
        [&](int step) {
            if (part.col_tile(step) > 0) return;
            block_barrier(); // the previous row tile's S is no longer read
            fill_thin_transposed(Dense<Type>{s, m, FL_RANK}, part.rank, part.place(step).line, thin_s);
        },
        [&](int step, const u8* tile) {
            const int column_tile = part.col_tile(step);
            if (column_tile == 0) rows.clear();
            add_product<ALONG>(tile, thin + column_tile * THIN_BYTES, rows);
            columns.add(column_tile, tile, thin_s);
            if (column_tile == part.col_tiles - 1)
                each_sum(rows, part.place(step).line, m, part.rank,
                         [&](i64 i, i64 r, float sum) { row_sum.put(i * FL_RANK + r, sum); });
        });
    columns.put(part, col_sum, n);
    row_sum.collect(part.row, min_of(part.row + FL_ROWS, m), part.rank,
                    [&](i64 i, i64 r, float sum) { store(ds + i * FL_RANK + r, scaling * sum); });
    col_sum.collect(part.col, min_of(part.col + FL_COLUMNS, n), part.rank,
                    [&](i64 i, i64 r, float sum) { store(db + i * FL_RANK + r, from_float<LoraType>(scaling * sum)); });
}

// dA [r, K] = dSᵀ · drop(x)
FL_KERNEL(THREADS)
lora_input_gradient(const Type* __restrict__ x, const float* __restrict__ ds, const u64* __restrict__ seed,
                    LoraType* __restrict__ da, float* __restrict__ da_partial, u32* __restrict__ counters, i64 m, i64 k,
                    u32 threshold, float keep) {
    FL_SHARED(u8, ring, SLOTS * TILE_BYTES);
    FL_SHARED(u8, thin, THIN_BYTES); // dSᵀ of a row tile
    const Part part(m, k);
    const SharedSum col_sum = part.columns(da_partial, counters, k);
    ColumnSums columns;
    walk(
        Tall<FL_DROPOUT>{x, m, k, make_dropout<FL_DROPOUT>(seed, threshold, keep)}, ring, part.steps(),
        [&](int step) { return part.place(step); },
        [&](int step) {
            if (part.col_tile(step) > 0) return;
            block_barrier(); // the previous row tile's dS is no longer read
            fill_thin_transposed(Dense<float>{ds, m, FL_RANK}, part.rank, part.place(step).line, thin);
        },
        [&](int step, const u8* tile) { columns.add(part.col_tile(step), tile, thin); });
    columns.put(part, col_sum, k);
    const float factor = FL_DROPOUT ? keep : 1.0f;
    col_sum.collect(part.col, min_of(part.col + FL_COLUMNS, k), part.rank,
                    [&](i64 c, i64 r, float sum) { store(da + r * k + c, from_float<LoraType>(factor * sum)); });
}
#endif
