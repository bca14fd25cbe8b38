// Runs a kernel on the host: one fiber per thread, in shuffled order, a few blocks at a time.
//
// Knows threads, waiting and shared memory; nothing of what a kernel computes. A fault (a barrier that some
// threads never reach, a lane missing from a shuffle, a trap, a data race) ends the process with kFault and a
// message.
#pragma once

#include "order.h"

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace kvkeye::host_cuda {

constexpr int kFault = 70;                  // exit status
constexpr size_t kSharedLimit = 227 * 1024; // bytes per block on sm_90 and sm_100

// A line of a kernel.
struct Line {
  const char* file;
  int line;
};

// What gridDim, blockDim, blockIdx and threadIdx are for the running thread.
struct Place {
  dim3 grid, block_size, block, thread;
};
extern Place place;

struct Launch {
  const char* signature; // of the launching function, names the kernel
  dim3 grid, block;
  size_t shared; // bytes of shared memory
  std::function<void()> kernel;
};

// Runs all threads to their end. Returns what a launch would: 0, or an error for sizes that no GPU takes.
int run(const Launch& launch);

// The seed of all orders from now on.
void shuffle_by(uint64_t seed);

// From now on launches are printed, "threads shared-bytes kernel", and not run.
void print_launches();

// Whether the waiting statement at this place, "file:line", is to be left out: KVKEYE_WITHOUT names it.
bool left_out(const char* place);

void* shared_memory(size_t bytes);
int lane();

// Waits for all threads of the block; returns the sum of their values. One that is left out still waits, but
// orders no memory.
int barrier(const char* what, int value, Line here);

// Waits for the lanes of the mask; returns the 32 values, valid until the thread waits again.
const uint64_t* exchange(const char* what, unsigned mask, uint64_t value, Line here);

// Ends the process if `source` is not in the mask.
void require_lane(const char* what, unsigned mask, int source, Line here);

// Waits for all lanes of the warp; the last one calls `join` with what each of them brought.
void join_warp(const char* what, void* mine, void (*join)(void* const* lanes), Line here);

// Lets other threads run.
void give_way();

// Starts a copy of 16 bytes, or of 16 zeros, that is made as late as it may be: by a wait for its group.
void copy_async(void* target, const void* source, bool valid, Line here);
void commit_copies();
void wait_copies(unsigned groups_left);

[[noreturn]] void trap(Line here);

// ---- The race checker (race.cpp), present when the kernels are compiled with -fsanitize=thread ----

// Who made an access and what that thread had waited for.
struct Moment {
  unsigned block, thread;
  unsigned epoch;        // barriers of the block so far
  unsigned clock;        // __syncwarp calls of the thread so far
  const unsigned* knows; // [32]: how far into each lane's clock this thread can see
  const Order* order;    // what it has seen of other blocks
};
Moment now();
bool inside_a_kernel();
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Memory whose accesses are checked; a launch forgets earlier accesses.
void watch(const char* name, const void* memory, size_t bytes);
void forget(const void* memory);
void forget_accesses();
void note_atomic(const void* address, size_t bytes);
// Both ends of an asynchronous copy: between them its target may neither be read nor written.
void note_copy_begin(const void* target, const void* source, size_t bytes);
void note_copy_end(const void* target, const void* source, size_t bytes);

#define KVKEYE_UNSEEN __attribute__((noinline, no_sanitize("thread")))
// *address = update(*address) at once; returns what was there.
template <class T, class Update> KVKEYE_UNSEEN T atomic_update(T* address, Update update) {
  give_way();
  note_atomic(address, sizeof(T));
  publish(address);
  const T before = *address;
  *address = update(before);
  return before;
}
#undef KVKEYE_UNSEEN

} // namespace kvkeye::host_cuda
