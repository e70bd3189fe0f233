// Checked memory. A pointer in a kernel is a token: a tag that no real address has, a region, and an offset in it.
//
// Global buffers are checked for bounds, alignment and permission. Shared memory is checked for reads of what nobody
// wrote, for bytes that a copy is still on its way to, and for races: two accesses to a byte by different threads, one
// of them a store, with no barrier between them.

#include <algorithm>
#include <cstdio>
#include <deque>

#include "run.h"

namespace emulator {
namespace {

constexpr std::uint64_t TAG = std::uint64_t{1} << 62; // no canonical address: following one raises a fault
constexpr int REGION_SHIFT = 40;
constexpr std::uint64_t OFFSET_MASK = (std::uint64_t{1} << REGION_SHIFT) - 1;
constexpr std::int64_t ORIGIN = std::int64_t{1} << (REGION_SHIFT - 1); // a region's start, so that it can be underrun
constexpr int FIRST_SHARED = 0x1000;                                   // regions below are global buffers, from 1 on
constexpr int DYNAMIC = 0x2000;
constexpr int POISON = 0xff; // as a float of any width: not a number

// The accesses to one byte of shared memory.
struct Access {
    int thread = -1; // -1: none; MANY: several
    int block_epoch = 0;
    int warp_epoch = 0;
};
constexpr int MANY = 1 << 20;

struct Shadow {
    Access written, read;
    bool pending = false; // a copy is on its way here
};

struct Shared {
    const void* site;
    std::vector<char> bytes;
    std::vector<Shadow> shadow;
};

struct Copy {
    std::uint64_t shared;
    char bytes[16];
};

struct Copies {
    std::vector<Copy> open;               // not yet in a group
    std::deque<std::vector<Copy>> groups; // committed, oldest first
};

struct Memory {
    const Launch* launch = nullptr;
    std::vector<Shared> statics;
    Shared dynamic;
    std::vector<Copies> copies; // one a thread
} memory;

struct Target {
    int region;
    std::size_t offset;
    Shared* shared; // null: global
    char* host;
};

const char* name_of(int region) {
    if (region == DYNAMIC) return "dynamic shared memory";
    if (region >= FIRST_SHARED) return "a shared array";
    return memory.launch->buffers[region - 1].name;
}

// Checks that [pointer, pointer + size) lies in a region and is aligned.
Target find(const void* pointer, std::size_t size, const char* what) {
    const auto token = reinterpret_cast<std::uint64_t>(pointer);
    if (!(token & TAG)) fail("%s of %zu bytes at %p, which is no pointer of this launch", what, size, pointer);
    const int region = static_cast<int>((token & ~TAG) >> REGION_SHIFT);
    const auto offset = static_cast<std::int64_t>(token & OFFSET_MASK) - ORIGIN;
    Target target{region, static_cast<std::size_t>(offset), nullptr, nullptr};
    std::uint64_t bytes = 0;
    if (region == DYNAMIC) {
        target.shared = &memory.dynamic;
    } else if (region >= FIRST_SHARED && region - FIRST_SHARED < static_cast<int>(memory.statics.size())) {
        target.shared = &memory.statics[region - FIRST_SHARED];
    } else if (region >= 1 && region <= memory.launch->buffer_count) {
        target.host = static_cast<char*>(memory.launch->buffers[region - 1].host);
        bytes = memory.launch->buffers[region - 1].bytes;
    } else {
        fail("%s of %zu bytes at %p, which is no pointer of this launch", what, size, pointer);
    }
    if (target.shared) {
        target.host = target.shared->bytes.data();
        bytes = target.shared->bytes.size();
    }
    if (offset < 0 || static_cast<std::uint64_t>(offset) + size > bytes)
        fail("out of bounds: %s of %zu bytes at offset %lld of %s, which has %llu", what, size,
             static_cast<long long>(offset), name_of(region), static_cast<unsigned long long>(bytes));
    if (offset % static_cast<std::int64_t>(size))
        fail("misaligned: %s of %zu bytes at offset %lld of %s", what, size, static_cast<long long>(offset),
             name_of(region));
    target.host += offset;
    return target;
}

// Whether what `before` did is ordered before what the running thread does now.
bool ordered(const Access& before) {
    const int self = here().thread;
    if (before.thread == -1 || before.thread == self || before.block_epoch < block_epoch()) return true;
    return before.thread != MANY && before.thread / WARP == self / WARP && before.warp_epoch < warp_epoch();
}

void check_race(const Target& target, std::size_t byte, const Access& before, const char* what, const char* earlier) {
    if (!ordered(before)) {
        char thread[32];
        if (before.thread == MANY)
            std::snprintf(thread, sizeof thread, "several threads");
        else
            std::snprintf(thread, sizeof thread, "thread %d", before.thread);
        fail("race: %s of offset %zu of %s, %s by %s with no barrier in between", what, byte, name_of(target.region),
             earlier, thread);
    }
}

void note_shared_read(const Target& target, std::size_t size) {
    for (std::size_t byte = target.offset; byte < target.offset + size; ++byte) {
        Shadow& shadow = target.shared->shadow[byte];
        if (shadow.pending)
            fail("read of offset %zu of %s, to which a cp.async is on its way", byte, name_of(target.region));
        if (shadow.written.thread == -1)
            fail("read of offset %zu of %s, which nobody wrote", byte, name_of(target.region));
        check_race(target, byte, shadow.written, "read", "written");
        const bool alone = shadow.read.thread == here().thread || ordered(shadow.read);
        shadow.read = {alone ? here().thread : MANY, block_epoch(), warp_epoch()};
    }
}

void note_shared_write(const Target& target, std::size_t size, bool pending) {
    for (std::size_t byte = target.offset; byte < target.offset + size; ++byte) {
        Shadow& shadow = target.shared->shadow[byte];
        if (shadow.pending)
            fail("write to offset %zu of %s, to which a cp.async is on its way", byte, name_of(target.region));
        check_race(target, byte, shadow.written, "write", "written");
        check_race(target, byte, shadow.read, "write", "read");
        shadow.written = {here().thread, block_epoch(), warp_epoch()};
        shadow.pending = pending;
    }
}

void prepare(Shared& shared, std::size_t size) {
    shared.bytes.assign(size, static_cast<char>(POISON));
    shared.shadow.assign(size, Shadow{});
}

void* token(int region) {
    return reinterpret_cast<void*>(TAG | static_cast<std::uint64_t>(region) << REGION_SHIFT | ORIGIN);
}

void land(const Copy& copy) {
    const auto* pointer = reinterpret_cast<const void*>(copy.shared);
    const Target target = find(pointer, sizeof copy.bytes, "cp.async");
    for (std::size_t i = 0; i < sizeof copy.bytes; ++i) {
        Shadow& shadow = target.shared->shadow[target.offset + i];
        shadow.pending = false;
        shadow.written = {here().thread, block_epoch(), warp_epoch()};
    }
    std::copy(copy.bytes, copy.bytes + sizeof copy.bytes, target.host);
}

} // namespace

extern "C" void* global_pointer(int buffer) { return token(1 + buffer); }

void memory_begin(const Launch& launch) { memory.launch = &launch; }

void memory_begin_block(int threads) {
    memory.statics.clear();
    prepare(memory.dynamic, memory.launch->dynamic_shared);
    memory.copies.assign(threads, Copies{});
}

void* static_shared(const void* site, std::size_t size) {
    auto& statics = memory.statics;
    const auto same = [site](const Shared& shared) { return shared.site == site; };
    auto found = std::find_if(statics.begin(), statics.end(), same);
    if (found == statics.end()) {
        statics.push_back({site, {}, {}});
        found = statics.end() - 1;
        prepare(*found, size);
    }
    return token(FIRST_SHARED + static_cast<int>(found - statics.begin()));
}

void* dynamic_shared() { return token(DYNAMIC); }

void read(const void* pointer, void* out, std::size_t size) {
    const Target target = find(pointer, size, "read");
    if (target.shared) note_shared_read(target, size);
    std::memcpy(out, target.host, size);
}

void write(void* pointer, const void* value, std::size_t size) {
    const Target target = find(pointer, size, "write");
    if (target.shared)
        note_shared_write(target, size, false);
    else if (!memory.launch->buffers[target.region - 1].writable)
        fail("write to %s, an input", name_of(target.region));
    std::memcpy(target.host, value, size);
}

void cp_async(void* shared, const void* global, int size, int bytes) {
    const Target to = find(shared, size, "cp.async");
    if (!to.shared) fail("cp.async to %s, which is not shared memory", name_of(to.region));
    note_shared_write(to, size, true);
    Copy copy{reinterpret_cast<std::uint64_t>(shared), {}};
    if (bytes != 0 && bytes != size) fail("cp.async of %d of %d bytes; it is all or none here", bytes, size);
    if (bytes) {
        const Target from = find(global, size, "read by cp.async");
        if (from.shared) fail("cp.async from shared memory");
        std::memcpy(copy.bytes, from.host, size);
    }
    memory.copies[here().thread].open.push_back(copy);
}

void cp_async_commit() {
    Copies& copies = memory.copies[here().thread];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
}

void cp_async_wait(int pending) {
    auto& groups = memory.copies[here().thread].groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.pop_front();
    }
}

} // namespace emulator
