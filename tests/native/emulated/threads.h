// The threads of a block: each a thread of the operating system, so that ThreadSanitizer sees their
// races; or, with VITSLIM_FIBERS, all of them on one, in turns, which takes a tenth of the time.
//
// In turns a thread runs until it waits. Their order is turned round with every block, so that
// where a barrier is missing one block or the next goes wrong, whether a thread reads what one
// before it writes or what one behind it writes.

#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef VITSLIM_FIBERS
#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#endif

namespace emulated {

struct Thread;
inline thread_local Thread* self = nullptr;  // the CUDA thread that runs

#ifndef VITSLIM_FIBERS

using Mutex = std::mutex;
using Condition = std::condition_variable;

// Calls body(i) for all i below count at once.
template <typename Body>
void run_threads(unsigned count, const Body& body) {
  std::vector<std::thread> running;
  for (unsigned i = 0; i < count; ++i) running.emplace_back([&body, i] { body(i); });
  for (std::thread& each : running) each.join();
}

#else

class Fibers {
 public:
  void run(unsigned count, const std::function<void(unsigned)>& body) {
    body_ = &body, left_ = count, waited_ = 0, backwards_ = !backwards_;
    while (stacks_.size() < count) stacks_.push_back(new_stack());
    fibers_.assign(count, {});
    for (unsigned i = 0; i < count; ++i) {
      const unsigned up = (i + 1) % count, down = (i + count - 1) % count;
      fibers_[i].next = backwards_ ? down : up;
      fibers_[i].before = backwards_ ? up : down;
    }
    current_ = backwards_ ? count - 1 : 0;
    if (_setjmp(end_) == 0) go_on();
    arrived();
  }

  // Gives the others their turn. It must be said afterwards whether it has `helped`.
  void wait() {
    if (++waited_ > 2 * left_) {
      std::fputs("all threads that are left wait, and not for the same\n", stderr);
      std::abort();
    }
    Thread* const mine = self;
    if (_setjmp(fibers_[current_].where) == 0) {
      current_ = fibers_[current_].next;
      go_on();
    }
    arrived();
    self = mine;
  }
  void helped() { waited_ = 0; }

 private:
  static constexpr size_t STACK = 256 * 1024, GUARD = 64 * 1024;

  struct Fiber {
    jmp_buf where;
    bool begun = false;
    unsigned next, before;  // in the ring of those that have not returned
  };

  [[noreturn, gnu::no_sanitize_address]] void go_on() {
    Fiber& fiber = fibers_[current_];
    leave_for(stacks_[current_], STACK);
    if (fiber.begun) _longjmp(fiber.where, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[current_];
    context.uc_stack.ss_size = STACK;
    makecontext(&context, begin, 0);
    setcontext(&context);
    std::abort();
  }

  static void begin();

  void run_current() {
    arrived();
    (*body_)(current_);
    const Fiber& fiber = fibers_[current_];
    fibers_[fiber.before].next = fiber.next;
    fibers_[fiber.next].before = fiber.before;
    current_ = fiber.next;
    waited_ = 0;
    if (--left_ > 0) go_on();
    leave_for(caller_, caller_size_);
    _longjmp(end_, 1);
  }

  // Tells AddressSanitizer which stack comes next, and that it has come.
#ifdef __SANITIZE_ADDRESS__
  void leave_for(const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(nullptr, stack, size);
  }
  void arrived() {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (caller_ == nullptr) caller_ = stack, caller_size_ = size;
  }
#else
  void leave_for(const void*, size_t) {}
  void arrived() {}
#endif

  // What runs over the end of a stack crashes.
  static void* new_stack() {
    void* const memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) {
      std::perror("a thread has no stack");
      std::abort();
    }
    return static_cast<char*>(memory) + GUARD;
  }

  std::vector<Fiber> fibers_;
  std::vector<void*> stacks_;
  const std::function<void(unsigned)>* body_ = nullptr;
  jmp_buf end_;
  const void* caller_ = nullptr;  // the stack of who calls run
  size_t caller_size_ = 0;
  unsigned current_ = 0, left_ = 0;
  unsigned waited_ = 0;  // turns, since one has helped
  bool backwards_ = true;
};
inline Fibers fibers;

inline void Fibers::begin() { fibers.run_current(); }

struct Mutex {
  void lock() {}
  void unlock() {}
};

struct Condition {
  template <typename There>
  void wait(std::unique_lock<Mutex>&, const There& there) {
    while (!there()) fibers.wait();
    fibers.helped();
  }
  void notify_all() {}
};

template <typename Body>
void run_threads(unsigned count, const Body& body) {
  if (count > 0) fibers.run(count, body);
}

#endif

}  // namespace emulated
