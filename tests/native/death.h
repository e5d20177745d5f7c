// Says which case was at work when a sanitizer, a signal or the clock ends the process.

#pragma once

#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>

namespace stress {

// A case takes well under a second; one that takes this long waits for ever.
constexpr unsigned SECONDS_OF_A_CASE = 120;

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

inline const char* case_command = "";
inline uint64_t case_seed = 0;

inline void say_case() {
  char text[160];
  const int length = std::snprintf(text, sizeof(text), "\nDIED; the same again: stress %s 1 %llu\n",
                                   case_command, static_cast<unsigned long long>(case_seed));
  if (write(STDERR_FILENO, text, length) != length) return;
}

// From now on a death is that of this case.
inline void begin_case(const char* command, uint64_t seed) {
  case_command = command;
  case_seed = seed;
  alarm(SECONDS_OF_A_CASE);
}

inline void watch_for_death() {
  const auto die = [](int signal) {
    say_case();
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  };
  std::signal(SIGALRM, die);
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback(say_case);
    return;
  }
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(signal, die);
}

}  // namespace stress
