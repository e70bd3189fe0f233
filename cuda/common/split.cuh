// Sums whose depth is split among blocks: each stores its part, and the last to arrive adds the parts in their order.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

// The steps [first, last) of `steps` that fall to this block of grid_z().
struct Share {
    int first, last;
};
FL_DEVICE Share share_of(i64 steps) {
    const i64 z = block_z(), splits = grid_z();
    return Share{static_cast<int>(steps * z / splits), static_cast<int>(steps * (z + 1) / splits)};
}

// The parts of an output of `size` elements.
struct Parts {
    float* partial; // [splits, size]
    i64 size;

    FL_DEVICE float* mine() const { return partial + block_z() * size; }
    FL_DEVICE void put(i64 index, float value) const { store(mine() + index, value); }
    FL_DEVICE float sum(i64 index) const {
        float total = 0.0f;
        for (int z = 0; z < grid_z(); ++z) total += load(partial + z * size + index);
        return total;
    }
    // Elements (row, col) … (row, col + 7) of an output of `cols` columns.
    FL_DEVICE void sum_run(i64 row, i64 cols, i64 col, float (&total)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] = 0.0f;
        for (int z = 0; z < grid_z(); ++z) {
            float part[8];
            load_run(partial + z * size + row * cols, cols, col, part);
#pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += part[i];
        }
    }
};

// Whether this block is the one that adds up; the parts of all blocks of its output tile are then in memory.
FL_DEVICE bool adds_up(u32* counters) {
    return last_to_arrive(counters + block_y() * grid_x() + block_x(), static_cast<u32>(grid_z()));
}
