// Stacks and the switch between them. AddressSanitizer is told of every switch, so its marks on the stack
// stay true.
#pragma once

#include <cstddef>

namespace kvkeye::host_cuda {

// A flow of control with its own stack. `body` never returns. Not movable: the stack holds its address.
class Fiber {
public:
  Fiber() = default; // the flow that is already running
  explicit Fiber(void (*body)(), size_t stack_bytes = 256 << 10);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves the running fiber, which must be `from`, and goes on where `to` left off.
  static void change(Fiber& from, Fiber& to);

private:
  static void begin();

  void (*body_)() = nullptr;
  char* memory_ = nullptr; // a page that faults, then the stack
  size_t mapped_ = 0;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* saved_ = nullptr; // stack pointer, or ucontext_t where the switch is not written by hand
  void* marks_ = nullptr; // AddressSanitizer's
};

} // namespace kvkeye::host_cuda
