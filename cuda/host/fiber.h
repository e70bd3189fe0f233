// A fiber a thread: a stack and a saved stack pointer.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

#if defined(__x86_64__)

// Pushes what a callee keeps, saves the stack pointer to *from, continues where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);

class Fiber {
public:
    // Prepares to run `entry`, which must not return, on `stack`.
    void start(char* stack, std::size_t size, void (*entry)()) {
        auto top = reinterpret_cast<std::size_t>(stack + size) & ~std::size_t{15};
        auto** slots = reinterpret_cast<void**>(top - 16);
        slots[0] = reinterpret_cast<void*>(entry); // where the first switch returns to
        slots[1] = nullptr;
        for (int i = 1; i <= 6; ++i) slots[-i] = nullptr;
        saved_ = slots - 6;
    }
    static void transfer(Fiber& from, Fiber& to) { emulator_switch(&from.saved_, to.saved_); }

private:
    void* saved_ = nullptr;
};

#else

} // namespace emulator
#include <ucontext.h>
namespace emulator {

class Fiber {
public:
    void start(char* stack, std::size_t size, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = size;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    static void transfer(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

private:
    ucontext_t context_;
};

#endif

} // namespace emulator
