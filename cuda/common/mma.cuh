// Tensor-core products by type: c [16×8, float32] += a [16×16] · b [16×8]; ptx.cuh says which lane holds what.
#pragma once
#include "dtype.cuh"

template <class T> struct Mma;
template <> struct Mma<half> {
    static FL_DEVICE void add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if FL_ARCH >= 80
        mma_m16n8k16_f16(c, a, b0, b1);
#else
        mma_m16n8k8_f16(c, a[0], a[1], b0);
        mma_m16n8k8_f16(c, a[2], a[3], b1);
#endif
    }
};
#if FL_ARCH >= 80 // sm_75 has no bfloat16 tensor core: fma.cu serves it
template <> struct Mma<bf16> {
    static FL_DEVICE void add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_m16n8k16_bf16(c, a, b0, b1); }
};
#endif
