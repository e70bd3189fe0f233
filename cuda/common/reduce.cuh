// Maxima and sums over lanes and blocks, in an order that is always the same.
#pragma once
#include "ptx.cuh"

// The greatest of `Lanes` neighbouring lanes' values, in all of them. Lanes is a power of two.
template <int Lanes> FL_DEVICE u32 group_max(u32 value) {
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2) {
        const u32 other = shuffle_xor(value, step);
        value = other > value ? other : value;
    }
    return value;
}

// The last block of those that share `counter` to get here, in every thread of it. What they stored before is visible
// to it. It sets the counter back to zero.
FL_DEVICE bool last_to_arrive(u32* counter, u32 sharers) {
    FL_SHARED(u32, is_last, 1);
    device_fence();
    block_barrier();
    if (thread_x() == 0) {
        const bool last = atomic_add(counter, 1) == sharers - 1;
        if (last) store(counter, 0u);
        store(is_last, static_cast<u32>(last));
    }
    block_barrier();
    device_fence();
    return load(is_last) != 0;
}
