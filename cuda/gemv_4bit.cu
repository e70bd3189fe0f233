// y = x · Wᵀ + bias + scaling · S · Bᵀ for one to eight rows of x.
//
// A block owns 16 · FL_TILES rows of W; its warps take turns along K. Rows of W are rows of the tensor core's first
// operand and rows of x columns of the second, so up to eight rows of x cost what one does, and codes go from memory to
// registers without passing through shared memory: a product does not mind in which order the depth is taken, so lane t
// of a quad simply takes RUN neighbouring values of its row of W and of x. A unit of 4 · RUN values lies in one block
// of the codec; its sum is scaled once.
#include "common/decode.cuh"
#include "common/epilogue.cuh"
#include "common/mma.cuh"
#include "common/scales.cuh"
#include "common/split.cuh"

using Type = FL_TYPE;
using LoraType = FL_LORA_TYPE;
using BiasType = FL_BIAS_TYPE;
using Codec = FL_CODEC;

constexpr int THREADS = 32 * FL_WARPS;
constexpr int ROWS = 16 * FL_TILES; // of W, a block
constexpr int COLS = 8;             // rows of x
constexpr int RUN = FL_BLOCK_SIZE >= 128 ? 32 : FL_BLOCK_SIZE / 4;
constexpr int UNIT = 4 * RUN;
constexpr int WORDS = RUN / 8;                       // of codes, a lane and row
constexpr int BATCH = WORDS * FL_TILES <= 2 ? 3 : 2; // units whose loads are on their way together

// Decodes words of eight codes: by byte permutes, or with FL_PAIR_TABLE by a table of the 256 bytes in shared memory, a
// copy for each lane so that no two lanes meet in a bank.
struct Decoder {
    const u32* table; // [256][32]

    FL_DEVICE Decoder() : table(nullptr) {
#if FL_PAIR_TABLE
        FL_SHARED(u32, pairs, 256 * 32);
        for (int i = thread_x(); i < 256 * 32; i += THREADS) {
            u32 words[4];
            decode8<Codec, Type>(static_cast<u32>(i / 32), words);
            store(pairs + i, words[0]);
        }
        table = pairs + thread_x() % 32;
        block_barrier();
#endif
    }

    FL_DEVICE void operator()(u32 codes, u32 (&out)[4]) const {
#if FL_PAIR_TABLE
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = load(table + (codes >> (8 * i) & 255u) * 32);
#else
        decode8<Codec, Type>(codes, out);
#endif
    }
};

// What a lane loads of one unit: codes and scales of rows g and g + 8 of each tile.
struct Unit {
    u32 codes[FL_TILES][2][WORDS];
    typename Scales<FL_NESTED>::Raw scale[FL_TILES][2];
    u32 x[WORDS][4];
};

// Where a lane finds its row of W: what it reads of unit u lies u units further.
struct Row {
    const u8* codes;
    typename Scales<FL_NESTED>::Window scales;
    u32 phase; // values between the start of the first block of the codec and the row's

    FL_DEVICE void load_unit(u32 unit, u32 (&words)[WORDS], typename Scales<FL_NESTED>::Raw& scale) const {
        load_once(codes + unit * (UNIT / 2), words);
        scale = scales.fetch((phase + unit * UNIT) / FL_BLOCK_SIZE);
    }
};

struct Gemv {
    const Type* x; // the lane's row, or null
    Row rows[FL_TILES][2];

    // Rows past the end read the last one; their sums are never written.
    FL_DEVICE Gemv(const Type* all_x, const u8* codes, const Scales<FL_NESTED>& scales, i64 m, i64 n, i64 k) {
        const int group = thread_x() % 32 / 4, own = thread_x() % 4 * RUN;
        x = group < m ? all_x + group * k + own : nullptr;
#pragma unroll
        for (int i = 0; i < 2 * FL_TILES; ++i) {
            const i64 row = min_of(static_cast<i64>(block_x()) * ROWS + 8 * i + group, n - 1), index = row * k;
            rows[i / 2][i % 2] = Row{codes + (index + own) / 2, scales.from(index / FL_BLOCK_SIZE),
                                     static_cast<u32>(index % FL_BLOCK_SIZE)};
        }
    }

    // Past the end it loads the last unit again, without a branch, and takes zeros for x.
    FL_DEVICE void load_unit(int unit, int last, Unit& out) const {
        const u32 at = static_cast<u32>(unit < last ? unit : last - 1);
#pragma unroll
        for (int i = 0; i < 2 * FL_TILES; ++i)
            rows[i / 2][i % 2].load_unit(at, out.codes[i / 2][i % 2], out.scale[i / 2][i % 2]);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            Words4 values{};
            if (unit < last && x) values = load(reinterpret_cast<const Words4*>(x + at * UNIT) + w);
#pragma unroll
            for (int i = 0; i < 4; ++i) out.x[w][i] = values.at[i];
        }
    }

    FL_DEVICE void add_unit(const Decoder& decode, const Unit& unit, float (&sums)[FL_TILES][4]) const {
#pragma unroll
        for (int tile = 0; tile < FL_TILES; ++tile) {
            float part[4] = {};
#pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                u32 low[4], high[4];
                decode(unit.codes[tile][0][w], low);
                decode(unit.codes[tile][1][w], high);
                const u32 first[4] = {low[0], high[0], low[1], high[1]};
                const u32 second[4] = {low[2], high[2], low[3], high[3]};
                Mma<Type>::add(part, first, unit.x[w][0], unit.x[w][1]);
                Mma<Type>::add(part, second, unit.x[w][2], unit.x[w][3]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float scale = rows[tile][half].scales.finish(unit.scale[tile][half]);
                sums[tile][2 * half] += scale * part[2 * half];
                sums[tile][2 * half + 1] += scale * part[2 * half + 1];
            }
        }
    }
};

FL_KERNEL(THREADS, 512 / THREADS)
gemv_4bit(const Type* __restrict__ x, const u8* __restrict__ codes, const void* __restrict__ absmax,
          const float* __restrict__ nested, const float* __restrict__ offset, const BiasType* __restrict__ bias,
          const Type* __restrict__ s, const LoraType* __restrict__ b, Type* __restrict__ y, float* __restrict__ partial,
          u32* __restrict__ counters, i64 m, i64 n, i64 k, float scaling) {
    FL_SHARED(float, warp_sums, FL_WARPS * COLS * ROWS); // [warp][row of x][row of W]
    const Decoder decode;
    const int warp = thread_x() / 32, lane = thread_x() % 32;
    const i64 first_row = static_cast<i64>(block_x()) * ROWS;
    const Gemv gemv(x, codes, Scales<FL_NESTED>(absmax, nested, offset), m, n, k);

    float sums[FL_TILES][4] = {};
    const Share share = share_of(k / UNIT);
    for (int first = share.first + warp; first < share.last; first += BATCH * FL_WARPS) {
        Unit units[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) gemv.load_unit(first + i * FL_WARPS, share.last, units[i]);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) gemv.add_unit(decode, units[i], sums);
    }
#pragma unroll
    for (int i = 0; i < 4 * FL_TILES; ++i) {
        const int row = 16 * (i / 4) + 8 * (i % 4 / 2) + lane / 4, col = lane % 4 * 2 + i % 2;
        store(warp_sums + (warp * COLS + col) * ROWS + row, sums[i / 4][i % 4]);
    }
    block_barrier();

    // From here a thread has whole elements of y: (output / ROWS, first_row + output % ROWS).
    const Parts parts{partial, m * n};
    const auto each = [&](auto&& use) {
#pragma unroll 1
        for (int output = thread_x(); output < COLS * ROWS; output += THREADS) {
            const i64 row = output / ROWS, col = first_row + output % ROWS;
            if (row < m && col < n) use(output, row, col);
        }
    };
    const auto block_sum = [&](int output) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < FL_WARPS; ++w) sum += load(warp_sums + w * COLS * ROWS + output);
        return sum;
    };
    if (grid_z() > 1) {
        each([&](int output, i64 row, i64 col) { parts.put(row * n + col, block_sum(output)); });
        if (!adds_up(counters)) return;
    }
    each([&](int output, i64 row, i64 col) {
        float sum = grid_z() > 1 ? parts.sum(row * n + col) : block_sum(output);
        if (FL_RANK > 0) sum += scaling * dot<FL_RANK>(s + row * FL_RANK, b + col * FL_RANK);
        if (bias) sum += to_float(load(bias + col));
        store(y + row * n + col, from_float<Type>(sum));
    });
}
