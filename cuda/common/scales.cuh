// The scale of a block: stored as float32, or in 8 bits with a scale for 256 of them and one offset.
#pragma once
#include "codebook.cuh"

constexpr int NESTED_BLOCK_SIZE = 256;

FL_DEVICE float dynamic8(u32 code) { return as_float(DYNAMIC8_VALUES[code]); }

// An int8 weight: code · SCB / 127, with 1 / 127 in float32, as the format's other readers decode it.
FL_DEVICE float int8_value(i8 code, float scb) { return static_cast<float>(code) * scb * 7.874016e-3f; }

template <bool Nested> class Scales;

template <> class Scales<false> {
public:
    FL_DEVICE Scales(const void* absmax, const float*, const float*) : absmax_(static_cast<const float*>(absmax)) {}
    FL_DEVICE float at(i64 block) const { return load(absmax_ + block); }

    // The same in two steps: `fetch` only loads, so that the wait for memory falls to `finish`.
    struct Raw {
        float absmax;
    };
    FL_DEVICE Raw fetch(i64 block) const { return {at(block)}; }
    FL_DEVICE float finish(const Raw& raw) const { return raw.absmax; }

private:
    const float* absmax_;
};

template <> class Scales<true> {
public:
    FL_DEVICE Scales(const void* absmax, const float* nested, const float* offset)
        : codes_(static_cast<const u8*>(absmax)), nested_(nested), offset_(load(offset)) {}
    FL_DEVICE float at(i64 block) const { return finish(fetch(block)); }

    struct Raw {
        u32 code;
        float nested;
    };
    FL_DEVICE Raw fetch(i64 block) const { return {load(codes_ + block), load(nested_ + static_cast<u64>(block) / NESTED_BLOCK_SIZE)}; }
    // Two roundings, as every reader of the format does: not a fused multiply-add.
    FL_DEVICE float finish(const Raw& raw) const {
        return add_rn(mul_rn(dynamic8(raw.code), raw.nested), offset_);
    }

private:
    const u8* codes_;
    const float* nested_;
    float offset_;
};
