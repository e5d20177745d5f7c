// A pool of threads, as the caller of the kernels would have one; one for each host thread.

#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/threads.h"
#include "random.h"

namespace stress {

// How a call's ranges are cut: as torch does, or in any other way that threads.h allows.
enum class Cut { EVEN, ANY };

class Pool {
 public:
  explicit Pool(int64_t count, Cut cut = Cut::EVEN, uint64_t seed = 0) : cut_(cut), random_(seed) {
    ranges_.reserve(count);
    for (int64_t i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  Pool(const Pool&) = delete;
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    if (current() == this) current() = nullptr;
  }

  // What the kernels get, from now on and on this host thread only.
  vitslim::Threads threads() {
    current() = this;
    return {int64_t(workers_.size()) + 1, run};
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  // The kernels hand over no pointer to the pool. A worker has none and computes nested calls
  // alone.
  static Pool*& current() {
    static thread_local Pool* pool = nullptr;
    return pool;
  }

  static void run(int64_t count, vitslim::ParallelBody body, void* context) {
    if (current()) return current()->share(count, body, context);
    if (count > 0) body(0, count, context);
  }

  void cut(int64_t count) {
    ranges_.clear();
    const int64_t most = std::min<int64_t>(count, int64_t(workers_.size()) + 1);
    if (most <= 0) return;
    if (cut_ == Cut::EVEN) {
      const int64_t size = (count + most - 1) / most;
      for (int64_t begin = 0; begin < count; begin += size)
        ranges_.push_back({begin, std::min(count, begin + size)});
      return;
    }
    for (int64_t begin = 0, left = random_.between(1, most); left > 0; --left) {
      const int64_t end = left == 1 ? count : random_.between(begin + 1, count - left + 1);
      ranges_.push_back({begin, end});
      begin = end;
    }
  }

  // All ranges are at work at the same time, each on a thread of its own.
  void share(int64_t count, vitslim::ParallelBody body, void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      cut(count);
      if (ranges_.empty()) return;
      body_ = body;
      context_ = context;
      busy_ = int64_t(ranges_.size());
      error_ = nullptr;
      ++turn_;
    }
    changed_.notify_all();
    current() = nullptr;
    call(0);
    current() = this;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

  void call(size_t i) {
    std::exception_ptr error;
    try {
      body_(ranges_[i].begin, ranges_[i].end, context_);
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (error) error_ = error;
    if (--busy_ == 0) done_.notify_one();
  }

  void work(size_t i) {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || turn_ != seen; });
        if (stopping_) return;
        seen = turn_;
        if (i >= ranges_.size()) continue;
      }
      call(i);
    }
  }

  Cut cut_;
  Random random_;
  std::vector<Range> ranges_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable changed_, done_;
  vitslim::ParallelBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t busy_ = 0, turn_ = 0;
  bool stopping_ = false;
  std::exception_ptr error_;
};

}  // namespace stress
