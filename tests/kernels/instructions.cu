// One kernel a wrapper of ptx.cuh: a warp applies it to what it reads, a value a lane.
#include "common/dtype.cuh"

FL_KERNEL(32) test_prmt(const u32* low, const u32* high, const u32* selector, u32* out) {
    const int i = thread_x();
    store(out + i, prmt(load(low + i), load(high + i), load(selector + i)));
}

FL_KERNEL(32) test_shuffle_xor(const u32* in, u32* out, u32 mask) {
    store(out + thread_x(), shuffle_xor(load(in + thread_x()), static_cast<int>(mask)));
}

FL_KERNEL(32) test_ballot(const u32* in, u32* out) { store(out + thread_x(), ballot(load(in + thread_x()) != 0)); }

FL_KERNEL(32) test_mul_hi(const u32* x, const u32* y, u32* out) {
    store(out + thread_x(), mul_hi(load(x + thread_x()), load(y + thread_x())));
}

// Matrix i is rows 8i … 8i + 7 of in [32, 8].
FL_KERNEL(32) test_ldmatrix(const u16* in, u32* out, u32 transposed) {
    FL_SHARED(u16, matrices, 32 * 8);
    const int lane = thread_x();
    for (int i = 0; i < 8; ++i) store(matrices + 8 * lane + i, load(in + 8 * lane + i));
    warp_barrier();
    u32 words[4];
    if (transposed)
        ldmatrix_x4_trans(words, matrices + 8 * lane);
    else
        ldmatrix_x4(words, matrices + 8 * lane);
    for (int i = 0; i < 4; ++i) store(out + 4 * lane + i, words[i]);
}

// Registers as they are: a [32, 4], b [32, 2], c [32, 4].
FL_KERNEL(32) test_mma_m16n8k16(const u32* a, const u32* b, float* c, u32 is_half) {
    const int lane = thread_x();
    u32 left[4];
    float sum[4];
    for (int i = 0; i < 4; ++i) left[i] = load(a + 4 * lane + i), sum[i] = load(c + 4 * lane + i);
    const u32 b0 = load(b + 2 * lane), b1 = load(b + 2 * lane + 1);
    if (is_half)
        mma_m16n8k16_f16(sum, left, b0, b1);
    else
        mma_m16n8k16_bf16(sum, left, b0, b1);
    for (int i = 0; i < 4; ++i) store(c + 4 * lane + i, sum[i]);
}

// a [32, 2], b [32, 1], c [32, 4].
FL_KERNEL(32) test_mma_m16n8k8(const u32* a, const u32* b, float* c) {
    const int lane = thread_x();
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = load(c + 4 * lane + i);
    mma_m16n8k8_f16(sum, load(a + 2 * lane), load(a + 2 * lane + 1), load(b + lane));
    for (int i = 0; i < 4; ++i) store(c + 4 * lane + i, sum[i]);
}

// Copies 16 bytes a lane through shared memory, in two groups; odd lanes copy zeros.
FL_KERNEL(32) test_cp_async(const u32* in, u32* out) {
    FL_SHARED(u32, buffer, 2 * 32 * 4);
    const int lane = thread_x();
    for (int group = 0; group < 2; ++group) {
        cp_async_16(buffer + group * 128 + 4 * lane, in + group * 128 + 4 * lane, lane % 2 ? 0 : 16);
        cp_async_commit();
    }
    cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) store(out + 4 * lane + i, load(buffer + 4 * lane + i));
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) store(out + 128 + 4 * lane + i, load(buffer + 128 + 4 * lane + i));
}

// float32 → float16 and bfloat16 bits, and back from float16; integers; alone and in pairs.
FL_KERNEL(32) test_convert(const float* in, u16* to_half, u16* to_bf16, u32* pair, float* back, int* integer) {
    const int i = block_x() * 32 + thread_x();
    const float x = load(in + i);
    store(to_half + i, cvt_f16_f32(x));
    store(to_bf16 + i, cvt_bf16_f32(x));
    store(pair + 2 * i, cvt_f16x2_f32(x, 2.0f));
    store(pair + 2 * i + 1, cvt_bf16x2_f32(x, 2.0f));
    store(back + i, cvt_f32_f16(cvt_f16_f32(x)));
    store(integer + i, cvt_rni(x < 1e6f && x > -1e6f ? x : 0.0f));
}
