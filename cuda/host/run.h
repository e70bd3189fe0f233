// The state of one emulated launch, shared by the emulator's own files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator.h"
#include "launch.h"

namespace emulator {

constexpr int WARP = 32;

// What a lane hands to a collective, and how it is answered once all lanes are there.
using Resolve = void (*)(void* const (&records)[WARP]);
struct Meeting {
    const char* name = nullptr; // null: the lane does not wait
    void* record = nullptr;
    Resolve resolve = nullptr;
};

struct Thread {
    enum State { READY, AT_BLOCK_BARRIER, AT_COLLECTIVE, DONE } state;
    Meeting meeting;
};

// The running thread, and how many barriers of its block and of its warp lie behind it.
int running_thread();
int block_epoch();
int warp_epoch();

// Waits for all lanes of the warp, which must call with the same name.
void meet(const char* name, void* record, Resolve resolve);

// memory.cpp: before the launch, before each block.
void memory_begin(const Launch& launch);
void memory_begin_block(int threads);

// What a kernel gets as the address of buffer `buffer` of the launch.
extern "C" void* global_pointer(int buffer);

} // namespace emulator
