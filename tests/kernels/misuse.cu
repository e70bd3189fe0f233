// Kernels that do what a GPU would punish at random. BROKEN=0 is right, BROKEN=1 is wrong, and the emulator must say
// so.
#include "common/ptx.cuh"

FL_KERNEL(64) misuse_barrier(const float* in, float* out) {
    FL_SHARED(float, values, 64);
    store(values + thread_x(), load(in + thread_x()));
    if (!BROKEN) block_barrier();
    store(out + thread_x(), load(values + 63 - thread_x()));
}

FL_KERNEL(32) misuse_warp_barrier(const float* in, float* out) {
    FL_SHARED(float, values, 32);
    store(values + thread_x(), load(in + thread_x()));
    if (!BROKEN) warp_barrier();
    store(out + thread_x(), load(values + 31 - thread_x()));
}

// The second store must wait for the readers of the first.
FL_KERNEL(64) misuse_reuse(const float* in, float* out) {
    FL_SHARED(float, values, 64);
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        store(values + thread_x(), load(in + thread_x()));
        block_barrier();
        sum += load(values + 63 - thread_x());
        if (!BROKEN) block_barrier();
    }
    store(out + thread_x(), sum);
}

FL_KERNEL(32) misuse_wait(const float* in, float* out) {
    FL_SHARED(float, values, 128);
    cp_async_16(values + 4 * thread_x(), in + 4 * (thread_x() % 8), 16);
    cp_async_commit();
    if (BROKEN)
        cp_async_wait<1>();
    else
        cp_async_wait<0>();
    store(out + thread_x(), load(values + 4 * thread_x()));
}

FL_KERNEL(32) misuse_unwritten(const float* in, float* out) {
    FL_SHARED(float, values, 32);
    if (!BROKEN || thread_x() != 5) store(values + thread_x(), load(in + thread_x()));
    store(out + thread_x(), load(values + thread_x()));
}

FL_KERNEL(32) misuse_read(const float* in, float* out) { store(out + thread_x(), load(in + thread_x() + BROKEN * 33)); }
FL_KERNEL(32) misuse_underrun(const float* in, float* out) { store(out + thread_x(), load(in + thread_x() - BROKEN)); }
FL_KERNEL(32) misuse_write(const float* in, float* out) {
    store(out + thread_x() + BROKEN * 33, load(in + thread_x()));
}
FL_KERNEL(32) misuse_input(const float* in, float* out) { store(BROKEN ? const_cast<float*>(in) : out, 1.0f); }
FL_KERNEL(32) misuse_shared(const float* in, float* out) {
    FL_SHARED(float, values, 32);
    store(values + thread_x() + BROKEN, load(in + thread_x()));
    warp_barrier();
    store(out + thread_x(), load(values + thread_x() + BROKEN));
}
FL_KERNEL(32) misuse_alignment(const u64* in, float* out) {
    store(out + thread_x(),
          static_cast<float>(load(reinterpret_cast<const u64*>(reinterpret_cast<const u32*>(in) + BROKEN))));
}
FL_KERNEL(32) misuse_pointer(const float* in, float* out) { store(out + thread_x(), BROKEN ? *in : load(in)); }
FL_KERNEL(32) misuse_null(const float* in, float* out) {
    store(out + thread_x(), load(BROKEN ? static_cast<const float*>(nullptr) : in));
}

FL_KERNEL(32) misuse_divergence(const float* in, float* out) {
    u32 sum = 0;
    if (!BROKEN || thread_x() != 7) sum = ballot(true);
    store(out + thread_x(), load(in) + static_cast<float>(sum));
}
FL_KERNEL(64) misuse_branch(const float* in, float* out) {
    if (!BROKEN || thread_x() < 32) block_barrier();
    store(out + thread_x(), load(in));
}
FL_KERNEL(32) misuse_kinds(const float* in, float* out) {
    const u32 value = BROKEN && thread_x() % 2 ? ballot(true) : shuffle_xor(1, 1);
    store(out + thread_x(), load(in) + static_cast<float>(value));
}
