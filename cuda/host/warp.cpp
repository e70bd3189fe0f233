// Warp collectives: every lane leaves a record, and the last to arrive answers all of them.

#include <cmath>

#include "run.h"

namespace emulator {
namespace {

struct Shuffle {
    std::uint32_t value;
    int lane_mask;
    std::uint32_t result;
};

struct Vote {
    bool predicate;
    std::uint32_t result;
};

struct Matrices {
    std::uint16_t row[8]; // what this lane's address points at
    std::uint32_t (*words)[4];
    bool transposed;
};

void resolve_ldmatrix(void* const (&records)[WARP]) {
    auto& lanes = reinterpret_cast<Matrices* const(&)[WARP]>(records);
    for (int lane = 0; lane < WARP; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const auto element = [&](int row, int column) -> std::uint32_t { return lanes[8 * i + row]->row[column]; };
            const bool t = lanes[lane]->transposed;
            const std::uint32_t low = t ? element(pair, group) : element(group, pair);
            const std::uint32_t high = t ? element(pair + 1, group) : element(group, pair + 1);
            (*lanes[lane]->words)[i] = low | high << 16;
        }
    }
}

// The fragments of m16n8kK, K = 8 or 16: register i of a holds row g + 8 (i & 1) and columns 2t + 8 (i >> 1) and one
// more; register i of b holds column g and rows 2t + 8i and one more.
template <int K> struct Product {
    std::uint32_t a[K / 4];
    std::uint32_t b[K / 8];
    float (*c)[4];
    Widen widen;
};

template <int K> void resolve_mma(void* const (&records)[WARP]) {
    auto& lanes = reinterpret_cast<Product<K>* const(&)[WARP]>(records);
    float a[16][K], b[K][8];
    for (int lane = 0; lane < WARP; ++lane) {
        const Product<K>& product = *lanes[lane];
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            const auto value = [&](std::uint32_t word) {
                return product.widen(static_cast<std::uint16_t>(word >> (16 * half)));
            };
            for (int i = 0; i < K / 4; ++i) a[group + 8 * (i & 1)][pair + half + 8 * (i >> 1)] = value(product.a[i]);
            for (int i = 0; i < K / 8; ++i) b[pair + half + 8 * i][group] = value(product.b[i]);
        }
    }
    for (int lane = 0; lane < WARP; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
            float sum = (*lanes[lane]->c)[i];
            for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
            (*lanes[lane]->c)[i] = sum;
        }
    }
}

} // namespace

std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask) {
    Shuffle record{value, lane_mask, 0};
    meet("shfl", &record, [](void* const(&records)[WARP]) {
        auto& lanes = reinterpret_cast<Shuffle* const(&)[WARP]>(records);
        for (int lane = 0; lane < WARP; ++lane)
            lanes[lane]->result = lanes[(lane ^ lanes[lane]->lane_mask) % WARP]->value;
    });
    return record.result;
}

std::uint32_t ballot(bool predicate) {
    Vote record{predicate, 0};
    meet("vote.ballot", &record, [](void* const(&records)[WARP]) {
        auto& lanes = reinterpret_cast<Vote* const(&)[WARP]>(records);
        std::uint32_t bits = 0;
        for (int lane = 0; lane < WARP; ++lane) bits |= static_cast<std::uint32_t>(lanes[lane]->predicate) << lane;
        for (Vote* lane : lanes) lane->result = bits;
    });
    return record.result;
}

void ldmatrix_x4(std::uint32_t (&words)[4], const void* row, bool transposed) {
    struct alignas(16) Row {
        std::uint16_t elements[8];
    };
    const Row elements = load(static_cast<const Row*>(row));
    Matrices record{{}, &words, transposed};
    std::memcpy(record.row, elements.elements, sizeof record.row);
    meet(transposed ? "ldmatrix.trans" : "ldmatrix", &record, resolve_ldmatrix);
}

void mma_m16n8k8(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b0, Widen widen) {
    Product<8> record{{a0, a1}, {b0}, &c, widen};
    meet("mma.m16n8k8", &record, resolve_mma<8>);
}

void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Widen widen) {
    Product<16> record{{a[0], a[1], a[2], a[3]}, {b0, b1}, &c, widen};
    meet("mma.m16n8k16", &record, resolve_mma<16>);
}

float half_to_float(std::uint16_t x) {
    const int exponent = (x >> 10) & 31, fraction = x & 1023;
    const float sign = x & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return bit_cast<float>((x & 0x8000u) << 16 | static_cast<std::uint32_t>(exponent + 112) << 23 |
                           static_cast<std::uint32_t>(fraction) << 13);
}

int round_to_int(float x) { return static_cast<int>(std::nearbyint(x)); }

std::uint32_t prmt(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = low | static_cast<std::uint64_t>(high) << 32;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t nibble = selector >> (4 * i) & 15;
        const auto byte = static_cast<std::uint32_t>(bytes >> (8 * (nibble & 7)) & 255);
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}

} // namespace emulator
