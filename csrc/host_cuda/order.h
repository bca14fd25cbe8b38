// What __threadfence and atomics order between blocks: a fence ends what its thread, and through barriers its
// block, did before; an atomic after it publishes that; whoever then updates the same address and fences has
// seen it.
#pragma once

#include <cstddef>
#include <vector>

namespace kvkeye::host_cuda {

// A point that a thread's fence closed. Every access that lies before it in the thread's own view is covered.
struct Release {
  unsigned block, thread, epoch, fences;
  unsigned knows[32];
};

// One thread's part.
struct Order {
  unsigned fences = 0;
  const Release* released = nullptr;    // by its last fence
  std::vector<const Release*> observed; // by its atomics since
  std::vector<const Release*> acquired; // by fences after those atomics
};

// For the running thread.
void fence();
void publish(const void* atomic);

Order& running_order();
void forget_order();

// All that `order` has acquired, added to `sum`; a barrier gives every thread the sum.
void merge(std::vector<const Release*>& sum, const Order& order);

} // namespace kvkeye::host_cuda
