// Matrices as the products read them: eight neighbouring elements of a line at a time, in float32.
//
// `run(line, pos, out)` gives elements pos … pos + 7 of a line, pos a multiple of 8; what lies outside is zero.
#pragma once
#include "decode.cuh"
#include "dropout.cuh"
#include "scales.cuh"
#include "vec.cuh"

FL_DEVICE void zero8(float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0.0f;
}

// A plain matrix [lines, width].
template <class T> struct Dense {
    const T* data;
    i64 lines, width;

    FL_DEVICE void run(i64 line, i64 pos, float (&out)[8]) const {
        if (line >= lines || pos >= width) return zero8(out);
        load_run(data + line * width, width, pos, out);
    }
};

// mask ⊙ x / (1 - p), or x itself.
template <class T, bool Active> struct Dropped {
    Dense<T> x;
    Dropout dropout;

    FL_DEVICE void run(i64 line, i64 pos, float (&out)[8]) const {
        x.run(line, pos, out);
        if (!Active) return;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            u32 words[4];
            dropout.words(line, pos / 4 + group, words);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& value = out[4 * group + i];
                value = words[i] < dropout.threshold ? 0.0f : value * dropout.keep;
            }
        }
    }
};

// The weight [lines, width] in 4 bits: table[code] · absmax in float32.
template <class Codec, int BlockSize, bool Nested> struct Weight {
    const u8* codes;
    Scales<Nested> scales;
    i64 lines, width;

    FL_DEVICE Weight(const void* packed, const void* absmax, const float* nested, const float* offset, i64 n, i64 k)
        : codes(static_cast<const u8*>(packed)), scales(absmax, nested, offset), lines(n), width(k) {}

    FL_DEVICE void run(i64 line, i64 pos, float (&out)[8]) const {
        if (line >= lines || pos >= width) return zero8(out);
        const i64 index = line * width + pos;
        if (width % 8 == 0) {
            decode8<Codec>(load(reinterpret_cast<const u32*>(codes + index / 2)), out);
            const float scale = scales.at(index / BlockSize);
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] *= scale;
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = pos + i < width ? decode_at<Codec>(codes, index + i) * scales.at((index + i) / BlockSize) : 0.0f;
    }
};

// The weight in int8: code · SCB / 127.
struct int8;
template <int BlockSize> struct Weight<int8, BlockSize, false> {
    const i8* codes;
    const float* scb;
    i64 lines, width;

    FL_DEVICE Weight(const void* packed, const void* absmax, const float*, const float*, i64 n, i64 k)
        : codes(static_cast<const i8*>(packed)), scb(static_cast<const float*>(absmax)), lines(n), width(k) {}

    FL_DEVICE void run(i64 line, i64 pos, float (&out)[8]) const {
        if (line >= lines || pos >= width) return zero8(out);
        const i8* p = codes + line * width + pos;
        const float scale = load(scb + line);
        Vec<i8, 8> bytes{};
        if (width % 8 == 0)
            bytes = load(reinterpret_cast<const Vec<i8, 8>*>(p));
        else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (pos + i < width) bytes.at[i] = load(p + i);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = int8_value(bytes.at[i], scale);
    }
};
