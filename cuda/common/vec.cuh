// Vectors in memory: what one load or store instruction moves.
#pragma once
#include "dtype.cuh"

template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    T at[N];
};

using Words4 = Vec<u32, 4>; // 16 bytes

FL_DEVICE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }

// Eight values from `p`, 16-byte aligned, widened.
FL_DEVICE void load8(const float* p, float (&out)[8]) {
    const auto low = load(reinterpret_cast<const Vec<float, 4>*>(p));
    const auto high = load(reinterpret_cast<const Vec<float, 4>*>(p) + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = low.at[i], out[4 + i] = high.at[i];
}
template <class T> FL_DEVICE void load8(const T* p, float (&out)[8]) {
    const auto values = load(reinterpret_cast<const Vec<T, 8>*>(p));
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(values.at[i]);
}

// Eight values rounded to T and stored at `p`, 16-byte aligned.
FL_DEVICE void store8(float* p, const float (&values)[8]) {
    Vec<float, 4> low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) low.at[i] = values[i], high.at[i] = values[4 + i];
    store(reinterpret_cast<Vec<float, 4>*>(p), low);
    store(reinterpret_cast<Vec<float, 4>*>(p) + 1, high);
}
template <class T> FL_DEVICE void store8(T* p, const float (&values)[8]) {
    Words4 words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    store(reinterpret_cast<Words4*>(p), words);
}

// Eight values of which only `count` exist: the rest read as zero, or are not written.
template <class T> FL_DEVICE void load8_tail(const T* p, i64 count, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(load(p + i)) : 0.0f;
}
template <class T> FL_DEVICE void store8_tail(T* p, i64 count, const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < count) store(p + i, from_float<T>(values[i]));
}

// Elements pos … pos + 7 of a line of `width` that starts at `line`: vectors if every line starts on 16 bytes.
template <class T> FL_DEVICE void load_run(const T* line, i64 width, i64 pos, float (&out)[8]) {
    if (width % 8 == 0)
        load8(line + pos, out);
    else
        load8_tail(line + pos, width - pos, out);
}
template <class T> FL_DEVICE void store_run(T* line, i64 width, i64 pos, const float (&values)[8]) {
    if (width % 8 == 0)
        store8(line + pos, values);
    else
        store8_tail(line + pos, width - pos, values);
}
