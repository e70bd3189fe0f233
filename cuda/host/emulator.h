// What the twins in common/ptx.cuh call: the state of the block that is being emulated, and one function an
// instruction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

// Where the running thread stands.
struct Place {
    int thread;
    int block[3];
    int grid[3];
};
const Place& here();

// Ends the run: the message goes to the caller together with kernel, block and thread. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- memory.cpp: pointers in a kernel are tokens, so that only these functions can follow them. ---

void read(const void* pointer, void* out, std::size_t size);
void write(void* pointer, const void* value, std::size_t size);
void* static_shared(const void* site, std::size_t size);
void* dynamic_shared();
void cp_async(void* shared, const void* global, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

template <class T> T load(const T* pointer) {
    T value;
    read(pointer, &value, sizeof value);
    return value;
}
template <class T> void store(T* pointer, T value) { write(pointer, &value, sizeof value); }

// --- schedule.cpp ---

void block_barrier();
void warp_barrier();

// --- warp.cpp ---

std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask);
std::uint32_t ballot(bool predicate);
void ldmatrix_x4(std::uint32_t (&words)[4], const void* row, bool transposed);

using Widen = float (*)(std::uint16_t); // a 16-bit type to float32
void mma_m16n8k8(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b0, Widen widen);
void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Widen widen);

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
float half_to_float(std::uint16_t x);
int round_to_int(float x);
std::uint32_t prmt(std::uint32_t low, std::uint32_t high, std::uint32_t selector);

} // namespace emulator
