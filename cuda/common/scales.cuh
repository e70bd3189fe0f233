// The scale of a block: stored as float32, or in 8 bits with a scale for 256 of them and one offset.
#pragma once
#include "codebook.cuh"

constexpr u32 NESTED_BLOCK_SIZE = 256;

FL_DEVICE float dynamic8(u32 code) { return as_float(DYNAMIC8_VALUES[code]); }

// An int8 weight: code · SCB / 127, with 1 / 127 in float32, as the format's other readers decode it.
FL_DEVICE float int8_value(i8 code, float scb) { return static_cast<float>(code) * scb * 7.874016e-3f; }

// The scales of a weight. `from(block)` gives those from a block on, which are then counted in 32 bits; `fetch` only
// loads, so that the wait for memory falls to `finish`.
template <bool Nested> class Scales;

template <> class Scales<false> {
public:
    struct Raw {
        float absmax;
    };
    struct Window {
        const float* absmax;

        FL_DEVICE Raw fetch(u32 i) const { return {load(absmax + i)}; }
        FL_DEVICE static float finish(const Raw& raw) { return raw.absmax; }
        FL_DEVICE float at(u32 i) const { return load(absmax + i); }
    };

    FL_DEVICE Scales(const void* absmax, const float*, const float*) : absmax_(static_cast<const float*>(absmax)) {}
    FL_DEVICE Window from(i64 block) const { return {absmax_ + block}; }
    FL_DEVICE float at(i64 block) const { return load(absmax_ + block); }

private:
    const float* absmax_;
};

template <> class Scales<true> {
public:
    struct Raw {
        u32 code;
        float nested;
    };
    struct Window {
        const u8* codes;
        const float* nested;
        u32 phase; // blocks between the start of the nested block and the window's
        float offset;

        FL_DEVICE Raw fetch(u32 i) const { return {load(codes + i), load(nested + (phase + i) / NESTED_BLOCK_SIZE)}; }
        // Two roundings, as every reader of the format does: not a fused multiply-add.
        FL_DEVICE float finish(const Raw& raw) const { return add_rn(mul_rn(dynamic8(raw.code), raw.nested), offset); }
        FL_DEVICE float at(u32 i) const { return finish(fetch(i)); }
    };

    FL_DEVICE Scales(const void* absmax, const float* nested, const float* offset)
        : codes_(static_cast<const u8*>(absmax)), nested_(nested), offset_(load(offset)) {}
    FL_DEVICE Window from(i64 block) const {
        const u64 b = static_cast<u64>(block);
        return {codes_ + b, nested_ + b / NESTED_BLOCK_SIZE, static_cast<u32>(b % NESTED_BLOCK_SIZE), offset_};
    }
    FL_DEVICE float at(i64 block) const { return from(block).at(0); }

private:
    const u8* codes_;
    const float* nested_;
    float offset_;
};
