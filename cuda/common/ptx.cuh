// The only file that names instructions: one wrapper each, with its twin for the emulator beside it.
//
// Nothing else in this directory holds `asm`, an intrinsic, a built-in variable or the dereference of a pointer to
// global or shared memory. So whatever a kernel does, the emulator sees.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef __CUDACC__
#define FL_DEVICE __device__ __forceinline__
#define FL_DEVICE_CONSTEXPR __device__ constexpr
#define FL_TABLE static __device__ const
#define FL_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) // threads, least blocks a processor
#define FL_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FL_ARCH (__CUDA_ARCH__ / 10)
#else
#include "../host/emulator.h"
#define FL_DEVICE inline
#define FL_DEVICE_CONSTEXPR constexpr
#define FL_TABLE static const
#define FL_KERNEL(...) extern "C" void
#define FL_SHARED(type, name, count)   \
    static const char name##_site = 0; \
    type* const name = static_cast<type*>(emulator::static_shared(&name##_site, sizeof(type) * (count)))
#ifndef FL_ARCH
#define FL_ARCH 80
#endif
#endif

// --- Arithmetic that the compiler may not choose by itself. ---

// float32 bits to float16 bits, to nearest even, as a constant too: the twin of `cvt.rn.f16.f32`.
FL_DEVICE_CONSTEXPR u32 round_to_half(u32 x) {
    const u32 sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fffu;  // NaN
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u; // rounds to 2^16 or more
    // What is dropped: 13 bits of a normal number, more of one below 2^-14, whose hidden bit is then explicit.
    const u32 exponent = magnitude >> 23;
    if (exponent < 102) return sign; // below half of the smallest
    const bool normal = exponent >= 113;
    const u32 fraction = normal ? magnitude - (112u << 23) : (magnitude & 0x7fffffu) | 0x800000u;
    const u32 dropped = normal ? 13 : 126 - exponent;
    const u32 kept = fraction >> dropped, rest = fraction & ((1u << dropped) - 1), tie = 1u << (dropped - 1);
    return sign | (kept + (rest > tie || (rest == tie && (kept & 1))));
}

// float32 bits to bfloat16 bits, to nearest even. sm_75 has no instruction for it.
FL_DEVICE_CONSTEXPR u32 round_to_bf16(u32 x) {
    return (x & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (x + 0x7fffu + ((x >> 16) & 1)) >> 16;
}

FL_DEVICE float as_float(u32 x) {
#ifdef __CUDACC__
    return __uint_as_float(x);
#else
    return emulator::bit_cast<float>(x);
#endif
}

FL_DEVICE u32 as_bits(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    return emulator::bit_cast<u32>(x);
#endif
}

FL_DEVICE float cvt_f32_f16(u16 x) {
#ifdef __CUDACC__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return emulator::half_to_float(x);
#endif
}

FL_DEVICE u16 cvt_f16_f32(float x) {
#ifdef __CUDACC__
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return static_cast<u16>(round_to_half(as_bits(x)));
#endif
}

FL_DEVICE u16 cvt_bf16_f32(float x) {
#if defined(__CUDACC__) && FL_ARCH >= 80
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return static_cast<u16>(round_to_bf16(as_bits(x)));
#endif
}

// Both to float16, the first in the low half.
FL_DEVICE u32 cvt_f16x2_f32(float first, float second) {
#if defined(__CUDACC__) && FL_ARCH >= 80
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
#else
    return cvt_f16_f32(first) | static_cast<u32>(cvt_f16_f32(second)) << 16;
#endif
}

FL_DEVICE u32 cvt_bf16x2_f32(float first, float second) {
#if defined(__CUDACC__) && FL_ARCH >= 80
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
#else
    return cvt_bf16_f32(first) | static_cast<u32>(cvt_bf16_f32(second)) << 16;
#endif
}

// Product and sum with a rounding each: never fused.
FL_DEVICE float mul_rn(float x, float y) {
#ifdef __CUDACC__
    return __fmul_rn(x, y);
#else
    return x * y;
#endif
}

FL_DEVICE float add_rn(float x, float y) {
#ifdef __CUDACC__
    return __fadd_rn(x, y);
#else
    return x + y;
#endif
}

// 1 / x, correctly rounded.
FL_DEVICE float rcp_rn(float x) {
#ifdef __CUDACC__
    return __frcp_rn(x);
#else
    return 1.0f / x;
#endif
}

// The nearest integer, ties to even.
FL_DEVICE int cvt_rni(float x) {
#ifdef __CUDACC__
    return __float2int_rn(x);
#else
    return emulator::round_to_int(x);
#endif
}

// The high word of the product.
FL_DEVICE u32 mul_hi(u32 x, u32 y) {
#ifdef __CUDACC__
    return __umulhi(x, y);
#else
    return static_cast<u32>((static_cast<u64>(x) * y) >> 32);
#endif
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight of `low` and `high`; with bit 3 of that nibble, eight
// copies of the byte's sign.
FL_DEVICE u32 prmt(u32 low, u32 high, u32 selector) {
#ifdef __CUDACC__
    return __byte_perm(low, high, selector);
#else
    return emulator::prmt(low, high, selector);
#endif
}

// --- Where a thread stands. ---

#ifdef __CUDACC__
FL_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
FL_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FL_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FL_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
FL_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
FL_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
FL_DEVICE int grid_z() { return static_cast<int>(gridDim.z); }
#else
inline int thread_x() { return emulator::here().thread; }
inline int block_x() { return emulator::here().block[0]; }
inline int block_y() { return emulator::here().block[1]; }
inline int block_z() { return emulator::here().block[2]; }
inline int grid_x() { return emulator::here().grid[0]; }
inline int grid_y() { return emulator::here().grid[1]; }
inline int grid_z() { return emulator::here().grid[2]; }
#endif

// --- Memory. Pointers may be to global or to shared memory; the compiler sees which. ---

template <class T> FL_DEVICE T load(const T* p) {
#ifdef __CUDACC__
    return *p;
#else
    return emulator::load(p);
#endif
}

template <class T> FL_DEVICE void store(T* p, T value) {
#ifdef __CUDACC__
    *p = value;
#else
    emulator::store(p, value);
#endif
}

// Global memory that no thread reads twice: 8 or 16 bytes past the first-level cache.
FL_DEVICE void load_once(const void* p, u32 (&words)[2]) {
#ifdef __CUDACC__
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
#else
    emulator::read(p, words, sizeof words);
#endif
}
FL_DEVICE void load_once(const void* p, u32 (&words)[4]) {
#ifdef __CUDACC__
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(p));
#else
    emulator::read(p, words, sizeof words);
#endif
}
FL_DEVICE void load_once(const void* p, u32 (&words)[1]) {
#ifdef __CUDACC__
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(p));
#else
    emulator::read(p, words, sizeof words);
#endif
}

// The dynamic shared memory of the block, 128-byte aligned.
FL_DEVICE u8* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) u8 dynamic_shared_memory[];
    return dynamic_shared_memory;
#else
    return static_cast<u8*>(emulator::dynamic_shared());
#endif
}

// 16 bytes from global to shared memory, of which the first `bytes` (0 or 16) are read and the rest are zero. They are
// there for this thread after `cp_async_wait`, for others after a barrier behind it. sm_75 has only the plain copy.
FL_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
#if !defined(__CUDACC__)
    emulator::cp_async(shared, global, 16, bytes);
#elif FL_ARCH >= 80
    u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (bytes) value = *static_cast<const uint4*>(global);
    *static_cast<uint4*>(shared) = value;
#endif
}

// Closes a group of the copies that this thread has asked for.
FL_DEVICE void cp_async_commit() {
#if !defined(__CUDACC__)
    emulator::cp_async_commit();
#elif FL_ARCH >= 80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups, the latest, are on their way.
template <int Pending> FL_DEVICE void cp_async_wait() {
#if !defined(__CUDACC__)
    emulator::cp_async_wait(Pending);
#elif FL_ARCH >= 80
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// --- Order between threads. ---

FL_DEVICE void block_barrier() {
#ifdef __CUDACC__
    __syncthreads();
#else
    emulator::block_barrier();
#endif
}

FL_DEVICE void warp_barrier() {
#ifdef __CUDACC__
    __syncwarp();
#else
    emulator::warp_barrier();
#endif
}

// Makes this thread's stores visible to the whole device before what it stores later.
FL_DEVICE void device_fence() {
#ifdef __CUDACC__
    __threadfence();
#endif
}

FL_DEVICE u32 atomic_add(u32* p, u32 value) {
#ifdef __CUDACC__
    return atomicAdd(p, value);
#else
    u32 old = emulator::load(p);
    emulator::store(p, old + value);
    return old;
#endif
}

// --- Warp collectives. ---

FL_DEVICE u32 shuffle_xor(u32 value, int lane_mask) {
#ifdef __CUDACC__
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
#else
    return emulator::shuffle_xor(value, lane_mask);
#endif
}

FL_DEVICE u32 ballot(bool predicate) {
#ifdef __CUDACC__
    return __ballot_sync(0xffffffffu, predicate);
#else
    return emulator::ballot(predicate);
#endif
}

// Four 8×8 matrices of 16-bit elements: lanes 8i .. 8i+7 give the addresses of the rows of matrix i, 16 bytes each, and
// lane l gets elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 of every matrix.
FL_DEVICE void ldmatrix_x4(u32 (&words)[4], const void* row) {
#ifdef __CUDACC__
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
#else
    emulator::ldmatrix_x4(words, row, false);
#endif
}

// The same of the transposed matrices: lane l gets rows 2(l % 4) and 2(l % 4) + 1 of column l / 4.
FL_DEVICE void ldmatrix_x4_trans(u32 (&words)[4], const void* row) {
#ifdef __CUDACC__
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
#else
    emulator::ldmatrix_x4(words, row, true);
#endif
}

// c [16×8, float32] += a [16×8] · b [8×8]. With g = lane / 4 and t = lane % 4, a lane holds
//   a: (row g, columns 2t, 2t+1), (row g+8, …)       b: (rows 2t, 2t+1, column g)
//   c: (row g, columns 2t, 2t+1), (row g+8, …)
FL_DEVICE void mma_m16n8k8_f16(float (&c)[4], u32 a0, u32 a1, u32 b0) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    emulator::mma_m16n8k8(c, a0, a1, b0, cvt_f32_f16);
#endif
}

// c [16×8, float32] += a [16×16] · b [16×8]. A lane holds
//   a: (row g, columns 2t, 2t+1), (row g+8, the same), (row g, columns 2t+8, 2t+9), (row g+8, the same)
//   b: (rows 2t, 2t+1, column g), (rows 2t+8, 2t+9, column g)
FL_DEVICE void mma_m16n8k16_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if !defined(__CUDACC__)
    emulator::mma_m16n8k16(c, a, b0, b1, cvt_f32_f16);
#elif FL_ARCH >= 80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

FL_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if !defined(__CUDACC__)
    emulator::mma_m16n8k16(c, a, b0, b1, [](u16 x) { return as_float(static_cast<u32>(x) << 16); });
#elif FL_ARCH >= 80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
