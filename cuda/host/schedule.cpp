// Runs blocks one after the other and the threads of a block in turns: a thread runs until it waits. Which warp comes
// next, and from which end its lanes start, is drawn from the seed.

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>

#include "fiber.h"
#include "run.h"

#if defined(__x86_64__)
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {
namespace {

constexpr std::size_t STACK = 64 * 1024;

struct Scheduler {
    const Launch* launch = nullptr;
    void (*body)(void*) = nullptr;
    void* context = nullptr;
    std::mt19937_64 random;
    Place place{};
    int block_epoch = 0;
    std::vector<int> warp_epochs;
    std::vector<Thread> threads;
    std::vector<Fiber> fibers;
    std::unique_ptr<char[]> stacks;
    std::size_t stacks_size = 0;
    Fiber main;
    bool failed = false;
    sigjmp_buf fault;
} scheduler;

void leave() { Fiber::transfer(scheduler.fibers[scheduler.place.thread], scheduler.main); }

void thread_main() {
    scheduler.body(scheduler.context);
    scheduler.threads[scheduler.place.thread].state = Thread::DONE;
    leave();
}

void start_message() {
    const Launch& launch = *scheduler.launch;
    const Place& p = scheduler.place;
    std::snprintf(launch.message, launch.message_size, "%s, block (%d, %d, %d), thread %d: ", launch.kernel, p.block[0],
                  p.block[1], p.block[2], p.thread);
    scheduler.failed = true;
}

void append_message(const char* format, va_list arguments) {
    const Launch& launch = *scheduler.launch;
    const std::size_t length = std::strlen(launch.message);
    std::vsnprintf(launch.message + length, launch.message_size - length, format, arguments);
}

// From the scheduler itself, about thread `thread`.
void report(int thread, const char* format, ...) {
    scheduler.place.thread = thread;
    start_message();
    va_list arguments;
    va_start(arguments, format);
    append_message(format, arguments);
    va_end(arguments);
}

const char* state_of(int thread) {
    const Thread& t = scheduler.threads[thread];
    switch (t.state) {
    case Thread::READY:
        return "is ready";
    case Thread::AT_BLOCK_BARRIER:
        return "waits at the block barrier";
    case Thread::AT_COLLECTIVE:
        return t.meeting.name;
    case Thread::DONE:
        return "has left the kernel";
    }
    return "?";
}

// No thread can run and some are not done: name one that waits and one that keeps it waiting.
void report_deadlock() {
    const int count = scheduler.launch->threads;
    for (int i = 0; i < count; ++i) {
        const Thread& waiting = scheduler.threads[i];
        if (waiting.state == Thread::DONE) continue;
        const bool block = waiting.state == Thread::AT_BLOCK_BARRIER;
        const int first = block ? 0 : i / WARP * WARP, last = block ? count : first + WARP;
        for (int j = first; j < last; ++j) {
            const Thread& other = scheduler.threads[j];
            if (other.state != waiting.state || other.meeting.name != waiting.meeting.name) {
                report(i, "divergent collective: it waits (%s), thread %d does not (%s)", state_of(i), j, state_of(j));
                return;
            }
        }
    }
    report(0, "no thread can run");
}

// Runs the ready lanes of one warp until each waits; false if there was none.
bool run_warp(int warp) {
    bool any = false;
    const bool backwards = scheduler.random() & 1;
    for (int i = 0; i < WARP && !scheduler.failed; ++i) {
        const int thread = warp * WARP + (backwards ? WARP - 1 - i : i);
        if (scheduler.threads[thread].state != Thread::READY) continue;
        any = true;
        scheduler.place.thread = thread;
        Fiber::transfer(scheduler.main, scheduler.fibers[thread]);
    }
    return any;
}

void release_block_barrier() {
    for (Thread& thread : scheduler.threads)
        if (thread.state != Thread::AT_BLOCK_BARRIER) return;
    for (Thread& thread : scheduler.threads) thread.state = Thread::READY;
    ++scheduler.block_epoch;
}

void run_block() {
    const int count = scheduler.launch->threads;
    memory_begin_block(count);
    scheduler.block_epoch = 0;
    scheduler.warp_epochs.assign(count / WARP, 0);
    scheduler.threads.assign(count, Thread{Thread::READY, {}});
    for (int i = 0; i < count; ++i) scheduler.fibers[i].start(&scheduler.stacks[i * STACK], STACK, thread_main);
    std::vector<int> warps(count / WARP);
    std::iota(warps.begin(), warps.end(), 0);
    while (!scheduler.failed) {
        std::shuffle(warps.begin(), warps.end(), scheduler.random);
        bool any = false;
        for (int warp : warps) any |= !scheduler.failed && run_warp(warp);
        if (scheduler.failed) return;
        release_block_barrier();
        if (any) continue;
        const auto done = [](const Thread& thread) { return thread.state == Thread::DONE; };
        const auto ready = [](const Thread& thread) { return thread.state == Thread::READY; };
        if (std::all_of(scheduler.threads.begin(), scheduler.threads.end(), done)) return;
        if (std::none_of(scheduler.threads.begin(), scheduler.threads.end(), ready)) return report_deadlock();
    }
}

void run_blocks() {
    const int (&grid)[3] = scheduler.launch->grid;
    std::vector<int> blocks(static_cast<std::size_t>(grid[0]) * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), scheduler.random);
    for (int block : blocks) {
        scheduler.place.block[0] = block % grid[0];
        scheduler.place.block[1] = block / grid[0] % grid[1];
        scheduler.place.block[2] = block / grid[0] / grid[1];
        run_block();
        if (scheduler.failed) return;
    }
}

void on_fault(int) {
    start_message();
    std::strncat(scheduler.launch->message, "followed a pointer without a wrapper of ptx.cuh, or overflowed its stack",
                 scheduler.launch->message_size - std::strlen(scheduler.launch->message) - 1);
    siglongjmp(scheduler.fault, 1);
}

// While it lives, a fault ends the emulated launch and not the process.
class FaultHandler {
public:
    FaultHandler() : stack_(64 * 1024) {
        stack_t own{};
        own.ss_sp = stack_.data();
        own.ss_size = stack_.size();
        sigaltstack(&own, &old_stack_);
        struct sigaction action{};
        action.sa_handler = on_fault;
        action.sa_flags = SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv_);
        sigaction(SIGBUS, &action, &old_bus_);
    }
    ~FaultHandler() {
        sigaction(SIGSEGV, &old_segv_, nullptr);
        sigaction(SIGBUS, &old_bus_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    std::vector<char> stack_;
    stack_t old_stack_;
    struct sigaction old_segv_, old_bus_;
};

} // namespace

const Place& here() { return scheduler.place; }
int block_epoch() { return scheduler.block_epoch; }
int warp_epoch() { return scheduler.warp_epochs[scheduler.place.thread / WARP]; }

void fail(const char* format, ...) {
    start_message();
    va_list arguments;
    va_start(arguments, format);
    append_message(format, arguments);
    va_end(arguments);
    leave();
    __builtin_unreachable(); // a failed launch resumes no thread
}

void block_barrier() {
    scheduler.threads[scheduler.place.thread].state = Thread::AT_BLOCK_BARRIER;
    leave();
}

void warp_barrier() {
    char nothing = 0;
    meet("__syncwarp", &nothing, [](void* const(&)[WARP]) { ++scheduler.warp_epochs[scheduler.place.thread / WARP]; });
}

void meet(const char* name, void* record, Resolve resolve) {
    const int first = scheduler.place.thread / WARP * WARP;
    Thread* warp = &scheduler.threads[first];
    Thread& self = scheduler.threads[scheduler.place.thread];
    self.state = Thread::AT_COLLECTIVE;
    self.meeting = {name, record, resolve};
    void* records[WARP];
    for (int i = 0; i < WARP; ++i) {
        if (warp[i].state != Thread::AT_COLLECTIVE || warp[i].meeting.resolve != resolve) return leave();
        records[i] = warp[i].meeting.record;
    }
    resolve(records);
    for (int i = 0; i < WARP; ++i) {
        warp[i].state = Thread::READY;
        warp[i].meeting = {};
    }
}

int run(const Launch& launch, void (*body)(void*), void* context) {
    Scheduler& s = scheduler;
    s.launch = &launch;
    s.body = body;
    s.context = context;
    s.failed = false;
    s.random.seed(launch.seed);
    launch.message[0] = 0;
    std::copy(launch.grid, launch.grid + 3, s.place.grid);
    if (launch.threads % WARP || launch.threads < WARP || launch.threads > 1024) {
        report(0, "%d threads; a block has 32 to 1024 of them, whole warps", launch.threads);
        return 1;
    }
    s.fibers.resize(launch.threads);
    if (s.stacks_size < launch.threads * STACK) {
        s.stacks_size = launch.threads * STACK;
        s.stacks.reset(new char[s.stacks_size]);
    }
    memory_begin(launch);
    const FaultHandler handler;
    if (sigsetjmp(s.fault, 1) == 0) run_blocks();
    return s.failed;
}

} // namespace emulator
