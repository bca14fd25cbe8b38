#include "fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(KVKEYE_UCONTEXT)
// The registers that a called function must keep, then the stack pointer: a tenth of swapcontext's time,
// which makes a system call, and no interceptor that wipes AddressSanitizer's marks.
extern "C" void kvkeye_switch_stack(void** save, void* load);
asm(R"(
.text
.type kvkeye_switch_stack, @function
kvkeye_switch_stack:
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
.size kvkeye_switch_stack, .-kvkeye_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace kvkeye::host_cuda {
namespace {

constexpr size_t kPage = 65536; // a multiple of every page size in use

Fiber* leaving = nullptr; // set across a switch
Fiber* arriving = nullptr;

} // namespace

Fiber::Fiber(void (*body)(), size_t stack_bytes)
    : body_(body), mapped_(kPage + stack_bytes), stack_bytes_(stack_bytes) {
  void* found =
      mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED || mprotect(found, kPage, PROT_NONE) != 0) {
    std::perror("host_cuda: no memory for a thread's stack");
    std::exit(1);
  }
  memory_ = static_cast<char*>(found);
  stack_ = memory_ + kPage;
#if defined(__x86_64__) && !defined(KVKEYE_UCONTEXT)
  uint64_t* top = reinterpret_cast<uint64_t*>(memory_ + mapped_);
  *--top = 0;                                         // where begin() would return to
  *--top = reinterpret_cast<uint64_t>(&Fiber::begin); // where the first switch returns to
  for (int saved = 0; saved < 6; ++saved)
    *--top = 0;
  saved_ = top;
#else
  ucontext_t* context = new ucontext_t;
  getcontext(context);
  context->uc_stack = {memory_ + kPage, 0, stack_bytes};
  context->uc_link = nullptr;
  makecontext(context, &Fiber::begin, 0);
  saved_ = context;
#endif
}

Fiber::~Fiber() {
#if !defined(__x86_64__) || defined(KVKEYE_UCONTEXT)
  delete static_cast<ucontext_t*>(saved_);
#endif
  if (memory_ != nullptr)
    munmap(memory_, mapped_);
}

void Fiber::begin() {
#ifdef __SANITIZE_ADDRESS__
  // The first fiber to start learns where the flow that started it has its stack.
  const bool unknown = leaving->stack_ == nullptr;
  __sanitizer_finish_switch_fiber(nullptr, unknown ? &leaving->stack_ : nullptr,
                                  unknown ? &leaving->stack_bytes_ : nullptr);
#endif
  arriving->body_();
}

void Fiber::change(Fiber& from, Fiber& to) {
  leaving = &from;
  arriving = &to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.marks_, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__) && !defined(KVKEYE_UCONTEXT)
  kvkeye_switch_stack(&from.saved_, to.saved_);
#else
  if (from.saved_ == nullptr)
    from.saved_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.saved_), static_cast<ucontext_t*>(to.saved_));
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.marks_, nullptr, nullptr);
#endif
}

} // namespace kvkeye::host_cuda
