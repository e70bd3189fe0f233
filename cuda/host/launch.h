// A launch as the caller describes it, and EMULATE(name), which makes an entry point callable:
//
//   int emulate_name(const Launch*, void** arguments)      each points at a value, as in cuLaunchKernel
//   const char* signature_name()                           a letter an argument: p pointer, q 64 bits, u 32 bits, f
//   float
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace emulator {

// A global buffer, as the caller describes it.
struct Buffer {
    const char* name;
    void* host;
    std::uint64_t bytes;
    int writable;
};

// A launch, as the caller describes it.
struct Launch {
    const char* kernel;
    int grid[3];
    int threads;
    std::uint64_t dynamic_shared; // bytes
    std::uint64_t seed;           // of the order of blocks and warps
    const Buffer* buffers;
    int buffer_count;
    char* message; // receives the error
    std::uint64_t message_size;
};

// Runs every block of the launch, `body(context)` in every thread; 0, or 1 with a message.
int run(const Launch& launch, void (*body)(void*), void* context);

template <class T> constexpr char letter() {
    static_assert(std::is_pointer<T>::value || sizeof(T) == 8 || sizeof(T) == 4, "no such kernel argument");
    if (std::is_pointer<T>::value) return 'p';
    if (sizeof(T) == 8) return 'q';
    return std::is_floating_point<T>::value ? 'f' : 'u';
}

template <class... T> const char* signature(void (*)(T...)) {
    static const char letters[] = {letter<T>()..., 0};
    return letters;
}

template <class... T> struct Call {
    void (*kernel)(T...);
    void** arguments;

    template <std::size_t... I> void unpack(std::index_sequence<I...>) const {
        kernel(*static_cast<std::decay_t<T>*>(arguments[I])...);
    }
    static void body(void* self) { static_cast<Call*>(self)->unpack(std::index_sequence_for<T...>{}); }
};

template <class... T> int call(void (*kernel)(T...), const Launch& launch, void** arguments) {
    Call<T...> call{kernel, arguments};
    return run(launch, &Call<T...>::body, &call);
}

} // namespace emulator

#define EMULATE(name)                                                                 \
    extern "C" int emulate_##name(const emulator::Launch* launch, void** arguments) { \
        return emulator::call(name, *launch, arguments);                              \
    }                                                                                 \
    extern "C" const char* signature_##name() { return emulator::signature(name); }
