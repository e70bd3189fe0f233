// float16 and bfloat16 as bits, and their conversions.
#pragma once
#include "ptx.cuh"

struct half {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// The 16 bits of float32 bits `x`, rounded to nearest even, as a constant too.
template <class T> struct Rounded;
template <> struct Rounded<half> {
    static FL_DEVICE_CONSTEXPR u32 bits(u32 x) { return round_to_half(x); }
};
template <> struct Rounded<bf16> {
    static FL_DEVICE_CONSTEXPR u32 bits(u32 x) { return round_to_bf16(x); }
};

FL_DEVICE float to_float(float x) { return x; }
FL_DEVICE float to_float(half x) { return cvt_f32_f16(x.bits); }
FL_DEVICE float to_float(bf16 x) { return as_float(static_cast<u32>(x.bits) << 16); }

template <class T> FL_DEVICE T from_float(float x);
template <> FL_DEVICE float from_float<float>(float x) { return x; }
template <> FL_DEVICE half from_float<half>(float x) { return half{cvt_f16_f32(x)}; }
template <> FL_DEVICE bf16 from_float<bf16>(float x) { return bf16{cvt_bf16_f32(x)}; }

// Two values rounded to T in one word, the first in the low half.
template <class T> FL_DEVICE u32 pack2(float first, float second);
template <> FL_DEVICE u32 pack2<half>(float first, float second) { return cvt_f16x2_f32(first, second); }
template <> FL_DEVICE u32 pack2<bf16>(float first, float second) { return cvt_bf16x2_f32(first, second); }
