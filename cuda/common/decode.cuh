// Codes to values. A table of sixteen entries is held as byte planes, plane i being byte i of every entry: sixteen
// bytes in four constants. Three byte permutes look up four codes in a plane: one in each half of the table, and one
// that chooses between them by the code's high bit.
#pragma once
#include "codebook.cuh"
#include "dtype.cuh"

struct nf4 {
    static FL_DEVICE_CONSTEXPR u32 value(int code) { return NF4_VALUES[code]; }
    static constexpr int ZERO_CODE = 7;
};
struct fp4 {
    static FL_DEVICE_CONSTEXPR u32 value(int code) { return FP4_VALUES[code]; }
    static constexpr int ZERO_CODE = 0;
};

// Bits of an entry as type T.
template <class Codec, class T> struct Entry {
    static FL_DEVICE_CONSTEXPR u32 bits(int code) { return Rounded<T>::bits(Codec::value(code)); }
};
template <class Codec> struct Entry<Codec, float> {
    static FL_DEVICE_CONSTEXPR u32 bits(int code) { return Codec::value(code); }
};

// Byte `byte` of entries 4·quarter … 4·quarter + 3.
template <class Codec, class T> FL_DEVICE_CONSTEXPR u32 plane_word(int byte, int quarter) {
    u32 word = 0;
    for (int i = 0; i < 4; ++i) word |= (Entry<Codec, T>::bits(4 * quarter + i) >> (8 * byte) & 255u) << (8 * i);
    return word;
}

// Plane `Byte` of four codes. `low` holds their low three bits, `high` 4·(bit 3) + i in nibble i.
template <class Codec, class T, int Byte> FL_DEVICE u32 look_up(u32 low, u32 high) {
    constexpr u32 q0 = plane_word<Codec, T>(Byte, 0), q1 = plane_word<Codec, T>(Byte, 1);
    constexpr u32 q2 = plane_word<Codec, T>(Byte, 2), q3 = plane_word<Codec, T>(Byte, 3);
    return prmt(prmt(q0, q1, low), prmt(q2, q3, low), high);
}

// The selectors of eight packed codes for look_up; those of the last four are 16 bits higher.
FL_DEVICE u32 low_selector(u32 codes) { return codes & 0x77777777u; }
FL_DEVICE u32 high_selector(u32 codes) { return (codes >> 1 & 0x44444444u) | 0x32103210u; }

// A byte holds its first code in the high nibble, so of four looked-up bytes the first is number 1, then 0, 3, 2. These
// selectors put bytes of two planes side by side and the codes into order.
constexpr u32 FIRST_PAIR = 0x4051, SECOND_PAIR = 0x6273;

// Eight packed codes as table values of the 16-bit type T, unscaled: two a word, in order.
template <class Codec, class T> FL_DEVICE void decode8(u32 codes, u32 (&out)[4]) {
    u32 low = low_selector(codes), high = high_selector(codes);
#pragma unroll
    for (int half = 0; half < 2; ++half, low >>= 16, high >>= 16) {
        const u32 plane0 = look_up<Codec, T, 0>(low, high), plane1 = look_up<Codec, T, 1>(low, high);
        out[2 * half] = prmt(plane0, plane1, FIRST_PAIR);
        out[2 * half + 1] = prmt(plane0, plane1, SECOND_PAIR);
    }
}

// Eight packed codes as float32 table values.
template <class Codec> FL_DEVICE void decode8(u32 codes, float (&out)[8]) {
    u32 low = low_selector(codes), high = high_selector(codes);
#pragma unroll
    for (int half = 0; half < 2; ++half, low >>= 16, high >>= 16) {
        const u32 plane0 = look_up<Codec, float, 0>(low, high), plane1 = look_up<Codec, float, 1>(low, high);
        const u32 plane2 = look_up<Codec, float, 2>(low, high), plane3 = look_up<Codec, float, 3>(low, high);
        const u32 first_low = prmt(plane0, plane1, FIRST_PAIR), first_high = prmt(plane2, plane3, FIRST_PAIR);
        const u32 second_low = prmt(plane0, plane1, SECOND_PAIR), second_high = prmt(plane2, plane3, SECOND_PAIR);
        out[4 * half] = as_float(prmt(first_low, first_high, 0x5410));
        out[4 * half + 1] = as_float(prmt(first_low, first_high, 0x7632));
        out[4 * half + 2] = as_float(prmt(second_low, second_high, 0x5410));
        out[4 * half + 3] = as_float(prmt(second_low, second_high, 0x7632));
    }
}

// Eight packed codes times `scale`, rounded to T: what dequantization gives.
template <class Codec, class T> FL_DEVICE void decode8_exact(u32 codes, float scale, u32 (&out)[4]) {
    float values[8];
    decode8<Codec>(codes, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pack2<T>(values[2 * i] * scale, values[2 * i + 1] * scale);
}

// The table value of element `index` of a packed tensor, anywhere in a byte.
template <class Codec> FL_DEVICE float decode_at(const u8* codes, i64 index) {
    const u32 byte = load(codes + index / 2);
    float values[8];
    decode8<Codec>(byte, values);
    return index % 2 ? values[1] : values[0];
}
