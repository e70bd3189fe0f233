// What is added to one element of y after the sum over K: the bias and the low-rank branch.
#pragma once
#include "vec.cuh"

// Σ_j s[j] · b[j] over `Rank` elements.
template <int Rank, class S, class B> FL_DEVICE float dot(const S* s, const B* b) {
    float sum = 0.0f;
#pragma unroll 2
    for (int j = 0; j < Rank; j += 8) {
        float left[8], right[8];
        if (Rank % 8 == 0)
            load8(s + j, left), load8(b + j, right);
        else
            load8_tail(s + j, Rank - j, left), load8_tail(b + j, Rank - j, right);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += left[i] * right[i];
    }
    return sum;
}
